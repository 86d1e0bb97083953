"""What a SOUP step costs against a GRPO step: alternating blocks of steps inside one run of the countdown example.

Two runs differ by 10 % from noise alone; neighbouring blocks of one run do not. In every second block half of the
samples are mixed; in the others none is, and nothing is seeded. The first and the last step of a block are left out:
there, prefixes are seeded but not yet used, or the other way round.

Example:
    python -m benchmarks.step_cost --blocks 12 --block-length 10
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import wrapt

from recipe.soup.summary import PHASES, read_metrics

MODE = "soup_blocks"
BLOCK_LENGTH = "SOUP_BENCHMARK_BLOCK_LENGTH"
BOOTSTRAPS = 10_000


def register(trainer: Any) -> None:
    """Register a trainer whose mixed share alternates by block; `trainer` is the module recipe.soup.trainer."""
    from verl.trainer.ppo.v1.trainer_base import register_trainer

    class BlockSource(trainer.LookaheadSource):
        def lengths(self, ordinal: int) -> list[int]:
            step = ordinal // self.queue.prompts_per_step
            return super().lengths(ordinal) if step // int(os.environ[BLOCK_LENGTH]) % 2 else []

    @register_trainer(MODE)
    class BlockTrainer(trainer.SoupTrainer):
        source_class = BlockSource


def measure(metrics: dict[int, dict[str, float]], block_length: int) -> dict[str, np.ndarray]:
    """Ratios mixed / unmixed of the medians of neighbouring blocks, for the whole step and each phase."""
    blocks: dict[int, list[dict[str, float]]] = {}
    for step, values in metrics.items():
        place = (step - 1) % block_length
        if "timing_s/step" in values and 0 < place < block_length - 1:
            blocks.setdefault((step - 1) // block_length, []).append(values)
    ratios = {}
    for phase in ("step", *PHASES):
        key = f"timing_s/{phase}"
        if not all(key in values for block in blocks.values() for values in block):
            continue
        medians = [median(values[key] for values in blocks[index]) for index in sorted(blocks)]
        # Skip the first pair: vLLM still compiles, and lag 1 has only begun.
        ratios[phase] = np.array([on / off for off, on in zip(medians[2::2], medians[3::2], strict=False)])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=14, help="an even number; the first pair is not counted")
    parser.add_argument("--block-length", type=int, default=10, help="steps in a block")
    parser.add_argument("--folder", type=Path, default=Path("runs/step_cost"), help="where the run writes")
    args, overrides = parser.parse_known_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    environ = {**os.environ, "VERL_USE_EXTERNAL_MODULES": __spec__.name, BLOCK_LENGTH: str(args.block_length)}
    command = [
        *(sys.executable, "-m", "verl.trainer.main_ppo", "algorithm=grpo", "hardware=cpu", "example=countdown"),
        *(f"trainer.v1.trainer_mode={MODE}", "algorithm.soup.mixed_share=0.5"),
        *("algorithm.soup.lag=1", "trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.save_freq=-1"),
        *("trainer.rollout_data_dir=null", f"trainer.total_training_steps={args.blocks * args.block_length}"),
        *overrides,
    ]
    with (args.folder / "log.txt").open("w") as log:
        subprocess.run(command, cwd=args.folder, env=environ, stdout=log, stderr=subprocess.STDOUT, check=True)
    metrics = read_metrics(args.folder / "runs" / "countdown" / "grpo.jsonl")
    rng = np.random.default_rng(0)
    print("| phase | ratio (median of pairs) | 95 % interval | pairs |\n|---|---|---|---|")
    for phase, ratios in measure(metrics, args.block_length).items():
        medians = np.median(rng.choice(ratios, (BOOTSTRAPS, len(ratios))), axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        print(f"| {phase} | {np.median(ratios):.3f} | {low:.3f} to {high:.3f} | {len(ratios)} |")


if __name__ == "__main__":
    main()
elif BLOCK_LENGTH in os.environ:
    # verl imports this module before its plugins are loaded, so the trainer must not be imported yet.
    wrapt.register_post_import_hook(register, "recipe.soup.trainer")
