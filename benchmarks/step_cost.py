"""What a SOUP step costs against a GRPO step: alternating blocks of steps inside one run.

Two runs differ by 10 % from noise alone; neighbouring blocks of one run do not. In every second block half of the
samples are mixed; in the others none is, nothing is seeded and no snapshot is taken. The first two steps and the last
one of a block are left out: there, prefixes are sampled but not yet used, or the other way round. With `replay` the
prompts come again every second step, so that there is something to replay.

Writes one JSON file a source into `--results`, then a table and a plot of all that lie there.

Examples:
    python -m benchmarks.step_cost lookahead
    python -m benchmarks.step_cost snapshot algorithm.soup.snapshot.placement=standalone
    python -m benchmarks.step_cost lookahead --label lookahead_long data.max_response_length=112 \\
        algorithm.soup.prefix_length.max=56 actor_rollout_ref.rollout.max_model_len=128 \\
        actor_rollout_ref.rollout.ignore_eos=true
    python -m benchmarks.step_cost --render-only
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import wrapt

from benchmarks.report import machine, render
from recipe.soup.records.metrics_file import read_metrics
from recipe.soup.tools.summary import PHASES

BLOCK_LENGTH = "SOUP_BENCHMARK_BLOCK_LENGTH"
SOURCES = ("lookahead", "snapshot", "replay")
RESULTS = Path(__file__).parent / "results"
EDGES = 2, 1
"""Steps left out at the beginning and at the end of a block."""
UNCOUNTED = 2
"""Blocks left out at the beginning of a run."""
CPU = (
    *("hardware=cpu", "example=countdown", "data.train_max_samples=32", "trainer.total_epochs=100000"),
    *(
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.rollout_data_dir=null",
    ),
    *("algorithm.soup.lag=1", "algorithm.soup.warm_start=fill", "algorithm.soup.snapshot.every=1"),
)


def alternate(stage: Any) -> None:
    """Make the source of SOUP's trainer mix in every second block; `stage` is the module that makes it."""
    block_length = int(os.environ[BLOCK_LENGTH])
    make_source = stage.make_source

    def mixes(step: int) -> bool:
        return (step - 1) // block_length % 2 == 1

    def make_alternating_source(settings: Any, facts: Any, *rest: Any) -> Any:
        source = make_source(settings, facts, *rest)
        plan, take, updated = source.plan, source.take, source.updated

        def take_if_mixed(step: int) -> Any:
            chunk, prefixes = take(step)
            return chunk, prefixes if mixes(step) else [{} for _ in prefixes]

        def plan_if_mixed(place: int, messages: Any) -> Any:
            planned = plan(place, messages)
            return planned if mixes(place // facts.prompts_per_step + 1) else replace(planned, lengths=[])

        source.plan = plan_if_mixed
        source.take = take_if_mixed
        source.updated = lambda step: updated(step) if mixes(step) else None
        return source

    stage.make_source = make_alternating_source


def pairs(
    metrics: dict[int, dict[str, float]], block_length: int, key: str, uncounted: int = UNCOUNTED
) -> list[tuple[float, float]]:
    """Medians of a metric over each mixed block, and before it those of its unmixed neighbours (their mean).

    With the neighbours on both sides, a machine that gets slower or faster does not show. The first `uncounted` blocks
    are left out: engines still compile.
    """
    blocks: dict[int, list[float]] = {}
    first, last = EDGES[0], block_length - EDGES[1]
    for step, values in metrics.items():
        if key in values and first <= (step - 1) % block_length < last and step > uncounted * block_length:
            blocks.setdefault((step - 1) // block_length, []).append(values[key])
    medians = {block: median(values) for block, values in blocks.items()}
    # A run that was stopped may have a block without neighbours.
    counted = [block for block in medians if block % 2 == 1 and {block - 1, block + 1} & medians.keys()]
    return [(fmean(medians[i] for i in (b - 1, b + 1) if i in medians), medians[b]) for b in sorted(counted)]


def measure(metrics: dict[int, dict[str, float]], block_length: int, uncounted: int = UNCOUNTED) -> dict[str, Any]:
    """Seconds by phase (pairs of unmixed and mixed medians), and what mixing needs in tokens, requests and memory.

    Raises:
        SystemExit: no mixed block has an unmixed neighbour, in a run that was stopped early.
    """
    mixed = [
        values
        for step, values in metrics.items()
        if values.get("soup/train/prefix/tokens", 0) and (step - 1) % block_length >= EDGES[0]
    ]

    def middle(key: str) -> float:
        return median(values[key] for values in mixed)

    def largest(key: str) -> float:
        """verl puts the trainer's own metrics behind `actor/` or not."""
        return max(values.get(key, values.get(f"actor/{key}", 0.0)) for values in metrics.values())

    def compared(key: str) -> list[tuple[float, float]]:
        return pairs(metrics, block_length, key, uncounted)

    seconds = {phase: compared(f"timing_s/{phase}") for phase in ("step", *PHASES)}
    if not seconds["step"] or not mixed:
        raise SystemExit(f"{len(metrics)} steps hold no mixed block beside an unmixed one: give the run more time.")
    return {
        "seconds": {phase: values for phase, values in seconds.items() if values},
        "tokens_per_second": compared("perf/throughput"),
        "trainer_gib": {kind: largest(f"perf/max_memory_{kind}_gb") for kind in ("allocated", "reserved")},
        "mixed_samples": middle("soup/train/mixed/samples"),
        "prefix_tokens": middle("soup/train/prefix/tokens"),
        "continuation_tokens": middle("soup/train/continuation/tokens"),
        "extra_requests": middle("soup/cost/seed_requests"),
        "extra_tokens": middle("soup/cost/seed_tokens"),
        "spared_requests": middle("soup/train/mixed/without_continuation"),
        "bank_bytes": largest("soup/bank/bytes"),
        "snapshot_bytes": largest("soup/snapshots/bytes"),
        "snapshot_seconds": middle("timing_s/snapshot"),
    }


def run(args: argparse.Namespace, label: str, preset: Sequence[str], shown: Sequence[str]) -> dict[str, Any]:
    """One run of alternating blocks with the overrides `preset` and `shown`; returns what was measured.

    Raises:
        SystemExit: the run failed, with the end of its log, or was over before there was something to compare.
    """
    source, blocks, block_length, folder = args.source, args.blocks, args.block_length, args.folder
    folder.mkdir(parents=True, exist_ok=True)
    experiment = f"step_cost_{label}"
    for old in folder.glob(f"runs/*/{experiment}.jsonl"):
        old.unlink()  # of a run that logged under another project
    arguments = [
        *("algorithm=soup", f"algorithm.soup.source={source}", f"trainer.experiment_name={experiment}"),
        *("algorithm.soup.mixed_share=0.5", f"trainer.total_training_steps={blocks * block_length}"),
        *preset,
        *shown,
    ]
    environ = {**os.environ, "VERL_USE_EXTERNAL_MODULES": __spec__.name, BLOCK_LENGTH: str(block_length)}
    environ.setdefault("VERL_FILE_LOGGER_ROOT", "runs")
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments]
    path = folder / f"{label}.log"
    print(f"{label}: {blocks * block_length} steps; progress in {path}", flush=True)
    with path.open("w") as log, suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            command, cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT, timeout=args.seconds
        )
        if done.returncode:
            raise SystemExit(f"{label} failed:\n" + "".join(path.read_text().splitlines(keepends=True)[-40:]))
    found = list(folder.glob(f"runs/*/{experiment}.jsonl"))
    metrics = read_metrics(found[0]) if found else {}
    return {
        "label": label,
        "command": shlex.join(["python", "-m", "benchmarks.step_cost", *sys.argv[1:]]),
        "machine": machine(),
        **measure(metrics, block_length, args.uncounted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further arguments (key=value) go to verl, after the CPU example's own.",
    )
    parser.add_argument("source", nargs="?", choices=SOURCES, help="where prefixes come from")
    parser.add_argument("--label", help="names the result; the source by default")
    parser.add_argument("--blocks", type=int, default=15, help="an odd number")
    parser.add_argument("--block-length", type=int, default=8, help="steps in a block, at least 4")
    parser.add_argument("--uncounted", type=int, default=UNCOUNTED, help="blocks at the beginning that are left out")
    parser.add_argument("--seconds", type=float, help="stop the run then, and count the blocks that it has done")
    parser.add_argument("--folder", type=Path, default=Path("runs/step_cost"), help="where the runs write")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--no-example", action="store_true", help="not the CPU example: give model and data yourself")
    parser.add_argument("--render-only", action="store_true", help="only draw what is there")
    args, overrides = parser.parse_known_args()
    if not args.render_only:
        if args.source is None:
            parser.error("which source?")
        preset = () if args.no_example else CPU
        label = args.label or args.source
        result = run(args, label, preset, overrides)
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / f"step_cost_{label}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(render(args.results))


if __name__ == "__main__":
    main()
elif BLOCK_LENGTH in os.environ:
    # verl imports this module before its plugins are loaded, so the trainer must not be imported yet.
    wrapt.register_post_import_hook(alternate, "recipe.soup.verl_adapter.prompt_stage")
