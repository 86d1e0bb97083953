"""`soup compare`: run a study or read the logs of runs, and write the report."""

import argparse
from pathlib import Path

from recipe.soup.compare.execute import execute
from recipe.soup.compare.report import write_report
from recipe.soup.compare.results import Result, read_result
from recipe.soup.compare.study import DRIVERS, read_study

EXAMPLES = """examples:
  soup compare examples/countdown/studies/first.yaml --jobs 2
  soup compare --from-logs runs/countdown/grpo.jsonl runs/countdown/soup.jsonl --out runs/grpo_or_soup
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `soup compare` takes."""
    add = parser.add_argument
    add("study", type=Path, nargs="?", help="YAML file: driver, baseline, seeds, common, runs")
    add("--jobs", type=int, help="runs beside each other (default 1; with --ray the cluster's cores)")
    add("--ray", metavar="ADDRESS", help="of a Ray cluster that runs the lab's runs (auto: the one here)")
    add("--only", nargs="+", metavar="NAME", help="of the study's runs only these, and the baseline")
    add("--out", type=Path, help="folder (default: runs/studies/<name of the study>)")
    add("--from-logs", nargs="+", help="[NAME=]metrics.jsonl of verl; the first is the baseline")


def compare(args: argparse.Namespace) -> None:
    """Run a study, or read the logs of runs, and write the report."""
    if bool(args.study) == bool(args.from_logs):
        raise SystemExit("soup compare: give a study, or --from-logs.")
    results: dict[str, list[Result]] = {}
    if args.from_logs:
        logs = {name or Path(log).stem: Path(log) for name, _, log in (text.rpartition("=") for text in args.from_logs)}
        if len(logs) < len(args.from_logs):
            raise SystemExit("--from-logs: two logs have the same name; give NAME=path/to/metrics.jsonl.")
        for name, path in logs.items():
            dumps = [path.with_suffix("") / "validation", path.parent / "validation"]
            validation = next((folder for folder in dumps if folder.exists()), dumps[0])
            results[name] = [read_result(name, 0, path, validation)]
        baseline, out = next(iter(logs)), args.out or Path("comparison")
        commands = {name: str(path) for name, path in logs.items()}
    else:
        study = read_study(args.study)
        if args.only:
            study = study.only(args.only)
        out = args.out or Path("runs") / "studies" / args.study.stem
        # A cluster gets all of them at once, and starts as many as it has cores for.
        failed = execute(study, out, args.jobs or (len(study.in_folder(out)) if args.ray else 1), args.ray)
        for run in study.in_folder(out):
            if run.is_done:
                results.setdefault(run.name, []).append(read_result(run.name, run.seed, run.metrics, run.validation))
        if study.baseline not in results:
            raise SystemExit(f"No run of {study.baseline} came to its end: nothing to compare with; see {out}.")
        module = DRIVERS[study.driver][0]
        commands = {
            name: " ".join(["python -m", module, *study.common, *overrides]) for name, overrides in study.runs.items()
        }
        baseline = study.baseline
        if failed:
            print(f"{len(failed)} runs failed and are left out; the same command tries them again.")
    for path in write_report(results, baseline, commands, out):
        print(path)
