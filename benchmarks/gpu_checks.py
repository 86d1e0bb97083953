"""The checks of `benchmarks/gpu.sh` one after the other, for machines that are at hand for minutes at a time.

Takes those without a result, in their order, and starts one only if it is expected to fit into what is left of the
time. Each writes its result as soon as it is there; one that fails, or is still running when the time is up, leaves the
last lines of its log in `<check>.failed.txt` and is tried again by the next call.

Examples:
    benchmarks/gpu.sh all --seconds 540
    benchmarks/gpu.sh all --seconds 900 --results runs/rehearsal hardware=cpu
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.gpu_results import NO_GPU, Check, card, packages, render

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
LOGS = ROOT / "runs" / "gpu"
MARK = "== result"
"""The line of a check's output behind which its figures stand."""
TAIL = 60
"""Lines of a failed check's log that are kept."""
ENDING = 10.0
"""Seconds kept back for ending a check that runs over."""
COUNTING = 30.0
"""Seconds kept back in which `cost` writes its table and its picture."""


CHECKS = (
    Check(("exact", "lookahead"), 300, "fp32: every ratio against the policy that is claimed"),
    Check(("cost", "lookahead"), 420, "bf16: a mixed step against an unmixed one"),
    Check(("exact", "snapshot"), 360, "fp32, colocated: sleep, wake and CUDA IPC into a second engine"),
    Check(("lab", "grpo"), 120, "the lab: loss and gradient as on a CPU; a step, and the best possible"),
    Check(("log-probs", "rollout"), 330, "bf16: age and rounding, with the engine's log-probs"),
    Check(("log-probs", "trainer"), 330, "bf16: age and rounding, with the trainer's log-probs"),
    Check(("learn", "soup"), 420, "bf16: 60 steps of SOUP"),
    Check(("learn", "grpo"), 420, "bf16: 60 steps of its twin"),
)


def run_check(command: Sequence[str], log: Path, seconds: float) -> str | None:
    """Run a command in a process group of its own, and end the whole group, by its id, when it is over.

    Returns:
        what went wrong, or None.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    if code is None:
        return f"still running after {seconds:.0f} s"
    if code:
        return f"exit code {code}"
    return None if figures(log) else "no figures in its output"


def _end_group(process: subprocess.Popen) -> None:
    """Also what outlived its leader: a Ray that is on its way down still holds the GPU's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING / 2)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lines_of(log: Path) -> list[str]:
    """The log's lines, without what progress bars wrote: they draw themselves anew behind a carriage return."""
    return [line for line in log.read_bytes().decode(errors="replace").split("\n") if "\r" not in line]


def figures(log: Path) -> str:
    """What stands behind the mark, if it is there."""
    lines = lines_of(log)
    return "\n".join(lines[lines.index(MARK) + 1 :]).strip() if MARK in lines else ""


def run_all(checks: Sequence[Check], results: Path, seconds: float, script: Path, overrides: Sequence[str]) -> None:
    """Run what is open and fits, see above; writes into `results`."""
    results.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    for check in checks:
        result, failure = results / f"{check.name}.json", results / f"{check.name}.failed.txt"
        left = deadline - time.monotonic() - ENDING
        if result.exists():
            continue
        if left < check.seconds:
            print(
                f"{check.name}: not started, it needs about {check.seconds:.0f} s and {left:.0f} are left", flush=True
            )
            continue
        own = ()
        if check.arguments[0] == "cost":  # which counts the blocks that it has when it stops itself
            own = ("--seconds", f"{left - COUNTING:.0f}", "--results", str(results))
        command = [str(script), *check.arguments, *own, *overrides]
        log, began = LOGS / f"{check.name}.log", time.monotonic()
        print(f"{check.name}: started; log in {log}", flush=True)
        problem = run_check(command, log, left)
        took = time.monotonic() - began
        print(f"{check.name}: {problem or 'done'} ({took:.0f} s)", flush=True)
        if problem:
            tail = "\n".join(lines_of(log)[-TAIL:])
            failure.write_text(f"{shlex.join(command)}: {problem}\n{card()}\n\n{tail.rstrip()}\n")
        else:
            shown = shlex.join(["benchmarks/gpu.sh", *check.arguments, *overrides])
            facts = {"check": check.name, "proves": check.proves, "command": shown, "card": card()}
            facts |= {"packages": packages(), "date": date.today().isoformat(), "seconds": round(took)}
            result.write_text(json.dumps({**facts, "figures": figures(log)}, indent=1) + "\n")
            failure.unlink(missing_ok=True)
        (results / "README.md").write_text(render(checks, results))
    (results / "README.md").write_text(render(checks, results))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further arguments (key=value) go to verl, in every check.",
    )
    parser.add_argument("--seconds", type=float, required=True, help="of wall-clock time, all checks together")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results go")
    args, overrides = parser.parse_known_args()
    if strange := [override for override in overrides if "=" not in override]:
        parser.error(f"neither an option nor key=value: {' '.join(strange)}")
    if args.results.resolve() == RESULTS and card() == NO_GPU:
        raise SystemExit(f"{NO_GPU} here: for a rehearsal give --results runs/rehearsal hardware=cpu.")
    run_all(CHECKS, args.results.resolve(), args.seconds, ROOT / "benchmarks" / "gpu.sh", overrides)


if __name__ == "__main__":
    main()
