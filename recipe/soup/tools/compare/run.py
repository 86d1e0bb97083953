"""`soup-verl compare`: run a study or read the logs of runs, and write the report."""

import argparse
import shlex
from pathlib import Path

from recipe.soup.errors import refuse
from recipe.soup.records.metrics_file import metrics_of
from recipe.soup.tools.compare.check import check_runs
from recipe.soup.tools.compare.execute import execute
from recipe.soup.tools.compare.kept_runs import is_recorded, read_record, read_run
from recipe.soup.tools.compare.one_run import seed_overrides
from recipe.soup.tools.compare.report import WHOLE, at_the_end, write_report
from recipe.soup.tools.compare.results import Result, read_result
from recipe.soup.tools.compare.study import DRIVERS, read_study

EXAMPLES = """examples:
  soup-verl compare examples/countdown/studies/first.yaml --jobs 2
  soup-verl compare examples/countdown/studies/long.yaml --records docs/study/long_runs/runs
  soup-verl compare --from-logs runs/countdown/grpo.jsonl runs/countdown/soup.jsonl --out runs/grpo_or_soup
  soup-verl compare --from-logs grpo=a/0.jsonl grpo=a/1.jsonl soup=b/0.jsonl soup=b/1.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `soup-verl compare`."""
    add = parser.add_argument
    add("study", type=Path, nargs="?", help="YAML file: driver, baseline, seeds, common, runs")
    add("--jobs", type=int, help="runs beside each other (default 1; with --ray the cluster's cores)")
    add("--ray", metavar="ADDRESS", help="of a Ray cluster that runs the lab's runs (auto: the one here)")
    add("--only", nargs="+", metavar="NAME", help="of the study's runs only these, and the baseline")
    add("--records", type=Path, metavar="FOLDER", help="finished runs, kept small: not run again; new ones are added")
    add(
        "--minutes",
        type=float,
        help="end by then: start no run that would not; a killed one goes on with the next call",
    )
    add("--out", type=Path, help="folder (default: runs/studies/<name of the study>)")
    add(
        "--from-logs",
        nargs="+",
        metavar="LOG",
        help="[NAME=]metrics.jsonl of verl; the first is the baseline; logs with the same NAME are its seeds, in order",
    )


def read_logs(given: list[str]) -> dict[str, list[Path]]:
    """Sort logs by name: the NAME= before them, which several seeds may share, or else the name of their file.

    Raises:
        SystemExit: two logs without a name have equal file names.
    """
    logs: dict[str, list[Path]] = {}
    unnamed: list[str] = []
    for text in given:
        name, equals, path = text.partition("=")
        if Path(text).exists() or not path:  # a path may have a = in it
            name, path = Path(text).stem, text
            unnamed.append(name)
        elif equals and not name.strip():
            raise refuse("--from-logs", text, "there is no name before the =; give NAME=path/to/metrics.jsonl.")
        logs.setdefault(name, []).append(Path(path))
    if any(len(logs[name]) > 1 for name in unnamed):
        raise SystemExit("--from-logs: two logs have the same name; give NAME=path/to/metrics.jsonl.")
    return logs


def compare(args: argparse.Namespace) -> None:
    """Run a study, or read the logs of runs, and write the report."""
    if bool(args.study) == bool(args.from_logs):
        raise SystemExit("soup-verl compare: give a study, or --from-logs.")
    results: dict[str, list[Result]] = {}
    steps: list[int] = []
    if args.from_logs:
        logs = read_logs(args.from_logs)
        for name, paths in logs.items():
            for seed, path in enumerate(map(metrics_of, paths)):
                dumps = [path.with_suffix("") / "validation", path.parent / "validation"]
                validation = next((folder for folder in dumps if folder.exists()), dumps[0])
                results.setdefault(name, []).append(read_result(name, seed, path, validation))
        baseline, out = next(iter(logs)), args.out or Path("runs") / "comparison"
        commands = {name: shlex.join(map(str, paths)) for name, paths in logs.items()}
    else:
        study = read_study(args.study)
        if args.only:
            study = study.only(args.only)
        out = args.out or Path("runs") / "studies" / args.study.stem
        if "${" in str(out.absolute()):
            raise refuse("--out", out.absolute(), "Hydra would take the ${ for a reference; give another folder.")
        # A cluster gets all runs at once, and starts as many as it has cores for.
        jobs = args.jobs if args.jobs is not None else len(study.in_folder(out)) if args.ray else 1
        check_runs(study, out, args.records)
        failed = execute(study, out, jobs, args.ray, args.records, args.minutes)
        runs = study.in_folder(out)
        for run in runs:
            if run.is_done:
                results.setdefault(run.name, []).append(read_run(run))
            elif is_recorded(run, args.records):
                results.setdefault(run.name, []).append(read_record(run, args.records))
        if left := len(runs) - len(failed) - sum(map(len, results.values())):
            print(f"The time is up, and {left} of {len(runs)} runs are still to do; the same command goes on.")
        if failed:
            print(f"{len(failed)} runs failed and are left out; the same command tries them again.")
        if left and study.baseline not in results:
            return
        if study.baseline not in results:
            raise SystemExit(f"No run of {study.baseline} came to its end: nothing to compare with; see {out}.")
        module = DRIVERS[study.driver][0]
        commands = {
            name: shlex.join(["python", "-m", module, *study.common, *overrides, *seed_overrides("SEED")])
            for name, overrides in study.runs.items()
        }
        baseline, steps = study.baseline, study.steps
    title, _ = at_the_end(results)
    if title != WHOLE:
        print(f"The runs are of different length, and are compared: {title}.")
    for path in write_report(results, baseline, commands, out, steps):
        print(path)
