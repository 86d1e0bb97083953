"""Grade an evaluation's samples, as often as needed; none is sampled again."""

from pathlib import Path

from tqdm import tqdm

from recipe.soup.errors import first_line
from recipe.soup.records.problems import Problem
from recipe.soup.tools.evaluate.samples import Row, add_problem, graded
from recipe.soup.verl_adapter.grader import Grader, Response

GRADED_AT_ONCE = 64
"""Problems whose samples are graded together, so that a reward that asks a server waits for many answers at a time."""


def grade_missing(
    grader: Grader,
    name: str,
    problems: list[Problem],
    samples: dict[int, list[Row]],
    done: dict[int, list[Row]],
    out: Path,
) -> None:
    """Grade the samples that have no grade yet, and write them to `<name>.jsonl`, problem by problem.

    Raises:
        SystemExit: the reward failed on some; the others' grades are kept, and all samples.
    """
    missing = [i for i in sorted(samples) if i not in done]
    failed: list[tuple[Row, Exception]] = []
    with tqdm(total=len(missing), desc=f"{name}: grading", unit="problem", disable=not missing) as bar:
        for start in range(0, len(missing), GRADED_AT_ONCE):
            numbers = missing[start : start + GRADED_AT_ONCE]
            rows = [row for i in numbers for row in samples[i]]
            responses = [Response(problems[row["problem"]], row["output"], row["tokens"]) for row in rows]
            scores = list(zip(rows, grader.grade(responses), strict=True))
            failed += [(row, score) for row, score in scores if isinstance(score, Exception)]
            broken = {row["problem"] for row, _ in failed}
            for i in (i for i in numbers if i not in broken):
                told = [(row, score) for row, score in scores if row["problem"] == i and isinstance(score, dict)]
                done[i] = [graded(row, score) for row, score in told]
                add_problem(out / f"{name}.jsonl", done[i])
            bar.update(len(numbers))
    if failed:
        row, error = failed[0]
        why = f"{type(error).__name__}: {first_line(error)}"
        raise SystemExit(
            f"{name}: the reward failed on {len(failed)} samples, first on {row['output'][-200:]!r} (problem "
            f"{row['problem']}): {why}. The samples are kept; mend the reward, and repeat the command with --regrade."
        )
