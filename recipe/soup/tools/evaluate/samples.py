"""Keep an evaluation's samples on disk: a JSON line each, and whole problems only, so that a killed run can go on."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.soup.errors import first_line, refuse
from recipe.soup.records.json_lines import read_json_lines, writable
from recipe.soup.records.problems import Problem, correctness

SAMPLED = ("problem", "input", "gts", "output", "tokens", "finish_reason")
FORM = {"problem": int}
KIND = "the samples of an evaluation"
Row = dict[str, Any]
"""A sample: problem, input, gts, output, tokens, finish_reason; graded: acc, score, and what else its reward told."""


def facts(problem: Problem) -> Row:
    """Return what tells a problem from others, under the names of verl's dumps."""
    truth = problem.row.get("reward_model") or {}
    return {"input": problem.messages[-1]["content"], "gts": str(truth.get("ground_truth"))}


def sampled(number: int, problem: Problem, output: Any) -> Row:
    """Make one line of the samples; names are those of verl's dumps where they have one."""
    said = {"output": output.text, "tokens": len(output.token_ids), "finish_reason": output.finish_reason}
    return {"problem": number, **facts(problem), **said}


def graded(row: Row, score: dict[str, Any]) -> Row:
    """Add what a reward told; what has the name of one of our columns gets `told_` before it."""
    told = {f"told_{key}" if key in row else key: value for key, value in score.items()}
    return {**row, **told, "acc": correctness(score)}


def open_samples(
    path: Path, settings: dict[str, Any], samples: int, problems: Sequence[Problem]
) -> dict[int, list[Row]]:
    """Read the samples that an earlier run with the same settings left, by problem; incomplete problems are dropped.

    Args:
        path: the JSON lines; the settings are beside them, in a file of the same name with `.settings.json`.
        samples: number of samples for each problem.
        problems: problems of this run; samples of others stay in the file and are not returned.

    Raises:
        SystemExit: the earlier run had other settings or other problems.
    """
    beside = path.with_suffix(".settings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and beside.exists():
        earlier = _settings(beside)
        for key, value in settings.items():
            if earlier.get(key) != value:
                cure = "--regrade" if key.startswith("reward") else "another --out, or delete it"
                raise refuse(key, value, f"{path} was begun with {earlier.get(key)}; give {cure}.")
    beside.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    found: dict[int, list[Row]] = defaultdict(list)
    for row in read_json_lines(path, FORM, KIND) if path.exists() else []:
        found[row["problem"]].append(row)
    whole = {problem: rows for problem, rows in found.items() if len(rows) == samples}
    for number, rows in whole.items():
        if number < len(problems) and not facts(problems[number]).items() <= rows[0].items():
            raise refuse("data", path, f"problem {number} was another one then; give another --out, or delete it.")
    if path.exists():
        kept = path.with_suffix(".part")
        kept.write_text("".join(map(_lines, whole.values())), encoding="utf-8")
        kept.replace(path)
    return {number: rows for number, rows in whole.items() if number < len(problems)}


def adopt_samples(graded: Path, samples: Path) -> None:
    """Make the samples of an evaluation that kept them with their grades only, as earlier versions did."""
    beside = graded.with_suffix(".settings.json")
    if samples.exists() or not (graded.exists() and beside.exists()):
        return
    settings = _settings(beside)
    asked = {key: value for key, value in settings.items() if not key.startswith("reward")}
    samples.with_suffix(".settings.json").write_text(json.dumps(asked, indent=1), encoding="utf-8")
    rows = [{key: row[key] for key in SAMPLED if key in row} for row in read_json_lines(graded)]
    samples.write_text(_lines(rows), encoding="utf-8")


def add_problem(path: Path, rows: list[Row]) -> None:
    """Append all samples of one problem."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(rows))


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        found = first_line(error)
    if not isinstance(found, dict):
        raise refuse("file", path, f"is no JSON object ({found}); give another --out, or delete it with its samples.")
    return found


def _lines(rows: list[Row]) -> str:
    return "".join(
        json.dumps(writable(row), ensure_ascii=False, default=lambda value: value.tolist()) + "\n" for row in rows
    )
