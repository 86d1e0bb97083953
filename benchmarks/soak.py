"""A long run on the CPU: does memory grow, and do steps get slower? Measured from outside.

    python -m benchmarks.soak --steps 500 --out runs/soak
    python -m benchmarks.soak --report runs/soak

The run is the countdown example with small batches, in `<out>/run`. Every ten seconds the memory of each of its
processes is read; the report is a picture and a table: megabytes that each kind of process has gained in a hundred
steps, by a straight line through the second half of the run, and the seconds of a step in its quarters.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil

from recipe.soup.records.metrics_file import read_metrics

SECONDS = 10.0
FREE_GB = 8.0
"""Less memory than this on the machine, and the run is ended: others need it."""
MB = 2**20
KINDS = {
    "ray::TaskRunner": "trainer",
    "ray::WorkerDict": "training worker",
    "VLLM::EngineCore": "vLLM engine",
    "ray::vLLMHttpServer": "vLLM server",
    "ray::AgentLoopWorker": "agent loop",
    "ray::RewardLoopWorker": "reward worker",
    "ray::SimpleStorageUnit": "TransferQueue storage",
    "ray::TransferQueueController": "TransferQueue controller",
    "gcs_server": "Ray's head",
}
"""Kinds of processes by a part of their command line; the driver is the first, the object store in Ray's raylet."""
RUN = (
    *("algorithm=soup", "hardware=cpu", "example=countdown", "algorithm.soup.lag=8"),
    *("data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "trainer.total_epochs=100"),
    *("trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.logger=[console,file]"),
    *("trainer.save_freq=50", "trainer.max_actor_ckpt_to_keep=1", "hydra.callbacks.console.log=verl.log"),
)


def memory(driver: psutil.Process) -> dict[str, float]:
    """Return megabytes by kind of process: what is resident and not shared; of the object store, what is shared."""
    found: dict[str, float] = defaultdict(float)
    for process in [driver, *driver.children(recursive=True)]:
        try:
            line, used = " ".join(process.cmdline()), process.memory_info()
        except psutil.Error:
            continue
        if "raylet" in line.split(" ")[0]:
            found["object store"] += used.shared / MB
        kind = "driver" if process == driver else next((kind for part, kind in KINDS.items() if part in line), None)
        if kind is not None:
            found[kind] += (used.rss - used.shared) / MB
    return dict(found)


def soak(out: Path, steps: int) -> int:
    """Run, and write what was measured to `memory.jsonl`; returns the run's exit code."""
    folder = out / "run"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *RUN, f"trainer.total_training_steps={steps}"]
    began = time.time()
    with (folder / "terminal.txt").open("w") as terminal, (out / "memory.jsonl").open("w") as log:
        run = subprocess.Popen(command, cwd=folder, stdout=terminal, stderr=subprocess.STDOUT)
        driver = psutil.Process(run.pid)
        while run.poll() is None:
            time.sleep(SECONDS)
            sample: dict[str, Any] = {"seconds": time.time() - began, "step": steps_done(folder), "mb": memory(driver)}
            log.write(json.dumps(sample) + "\n")
            log.flush()
            if psutil.virtual_memory().available < FREE_GB * 2**30:
                print(f"Less than {FREE_GB:g} GB are free on this machine: the run is ended.", file=sys.stderr)
                run.terminate()
                run.wait()
        return run.returncode


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Return the run's metrics by step; none before its first."""
    path = folder / "runs" / "countdown" / "soup.jsonl"
    return read_metrics(path) if path.exists() else {}


def steps_done(folder: Path) -> int:
    """Return the last step whose metrics are written."""
    return max(metrics(folder), default=0)


def training(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the samples from the first step on, until the run ends its processes."""
    return [sample for sample in samples if sample["step"] > 0 and "trainer" in sample["mb"]]


def growth(samples: Iterable[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return, by kind, the megabytes at the end and those gained in a hundred steps over the second half of the run."""
    trained = training(samples)
    late = [sample for sample in trained if sample["step"] > trained[-1]["step"] / 2]
    found = {}
    for kind in sorted({kind for sample in late for kind in sample["mb"]}):
        points = [(sample["step"], sample["mb"][kind]) for sample in late if kind in sample["mb"]]
        if len({step for step, _ in points}) > 1:
            found[kind] = (points[-1][1], 100 * float(np.polyfit(*zip(*points, strict=True), deg=1)[0]))
    return found


def quarters(seconds: list[float]) -> list[float]:
    """Return the mean of each quarter of a run's steps."""
    return [mean(part) for part in np.array_split(seconds, 4) if len(part)]


def report(out: Path) -> str:
    """Return the table of a soak, and draw it to `soak.png`."""
    samples = [json.loads(line) for line in (out / "memory.jsonl").read_text().splitlines()]
    values = metrics(out / "run")
    seconds = [values[step]["timing_s/step"] for step in sorted(values) if "timing_s/step" in values[step]]
    lines = ["| process | MB at the end | MB gained in 100 steps |", "|---|---|---|"]
    lines += [f"| {kind} | {last:.0f} | {gain:+.2f} |" for kind, (last, gain) in growth(samples).items()]
    means = ", ".join(f"{value:.2f}" for value in quarters(seconds))
    draw(samples, seconds, out / "soak.png")
    return "\n".join([*lines, "", f"{len(seconds)} steps; seconds a step in the quarters of the run: {means}."])


def draw(samples: list[dict[str, Any]], seconds: list[float], path: Path) -> None:
    """Draw memory by step, and seconds a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = training(samples)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
    above.set_prop_cycle(color=pyplot.colormaps["tab20"](np.arange(20)))  # more kinds than the usual ten colours
    for kind in sorted(trained[-1]["mb"], key=lambda kind: -trained[-1]["mb"][kind]):
        points = [(sample["step"], sample["mb"][kind]) for sample in trained if kind in sample["mb"]]
        above.plot(*zip(*points, strict=True), label=kind)
    above.set(ylabel="memory, MB", ylim=(0, None))
    above.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    below.plot(range(1, len(seconds) + 1), seconds, linewidth=0.8)
    below.set(ylabel="seconds a step", xlabel="step", ylim=(0, None))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--report", type=Path, help="of a soak that was run before, or still runs")
    given = parser.parse_args()
    code = 0 if given.report else soak(given.out, given.steps)
    print(report(given.report or given.out))
    sys.exit(code)


if __name__ == "__main__":
    main()
