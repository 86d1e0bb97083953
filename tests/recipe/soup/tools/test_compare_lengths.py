"""Runs of different length are compared at the last step that all have, and the table says so."""

from pathlib import Path

import pandas as pd
import pytest

from recipe.soup.tools.compare.report import WHOLE, as_markdown, at_the_end, end_table, write_report
from recipe.soup.tools.compare.results import Result


def run(validated: list[int], end: int, seed: int = 0, dumps: bool = True) -> Result:
    """A run whose correct samples are as many as the step's number in tens, and whose entropy is its step."""
    metrics = {step: {"actor/entropy": float(step), "timing_s/step": 1.0} for step in range(1, end + 1)}
    counts = {step: {"problem": (step // 10, 100)} for step in validated} if dumps else {}
    return Result("x", seed, metrics, counts)


@pytest.mark.parametrize(
    ("grpo", "soup", "title", "ends"),
    [
        (run([0, 50, 100], 100), run([0, 50, 100], 100), WHOLE, {100}),
        (
            run([0, 50, 100, 150], 150),
            run([0, 50, 100], 100),
            "After step 100, the last that all have (they ended: grpo at 150, soup at 100)",
            {100},
        ),
        # Killed between two validations: training after the last of them does not count, either.
        (run([0, 50], 70), run([0, 50], 50), "After step 50, the last that all have", {50}),
        # As long, but validated at other steps.
        (run([50, 100], 100), run([25, 50, 75], 100), "After step 50, the last that all have", {50}),
        # Without dumps there are metrics.
        (run([], 150, dumps=False), run([], 1050, dumps=False), "After step 150, the last that all have", {150}),
        (
            run([0, 30, 1200], 1200),
            run([0, 40], 40),
            "After training, of different length: no step is common to all (grpo at 1,200, soup at 40)",
            {1200, 40},
        ),
        (run([], 3), run([], 0), "After training, of different length: no step is common to all", {3, 0}),
    ],
)
def test_the_last_step_that_all_have(grpo: Result, soup: Result, title: str, ends: set[int]) -> None:
    said, cut = at_the_end({"grpo": [grpo], "soup": [soup]})
    assert said.startswith(title)
    assert {of_name[0].ends[0] for of_name in cut.values()} == ends


def test_seeds_of_one_configuration_are_cut_as_well() -> None:
    said, cut = at_the_end({"grpo": [run([50, 100], 100), run([50], 50, seed=1)], "soup": [run([50, 100], 100)]})
    assert said == "After step 50, the last that all have (they ended: grpo at 50 and 100, soup at 100)"
    assert end_table(cut).loc["soup", "pass@1"].startswith("0.050 ")
    assert end_table(cut).loc["soup", "training entropy"] == "40.500"  # of steps 31 to 50


def test_the_report_says_so(tmp_path: Path) -> None:
    results = {"grpo": [run([50, 100], 100)], "soup": [run([50], 50)]}
    write_report(results, "grpo", {"grpo": "a", "soup": "b"}, tmp_path / "out", [50])
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "## After step 50, the last that all have (they ended: grpo at 100, soup at 50)" in text
    assert "| soup | 1 | 1 | +0.000 (+0.000 to +0.000) |" in text  # and not 0.05 - 0.1


def test_names_neither_end_a_cell_nor_become_tags(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>|x\ny"
    assert as_markdown(pd.DataFrame({"a|b": ["c"]}, index=[name])).splitlines() == [
        r"| | a\|b |",
        "|---|---|",
        r"| &lt;script&gt;alert(1)&lt;/script&gt;\|x y | c |",
    ]
    write_report({name: [run([1], 1)]}, name, {name: name}, tmp_path / "out")
    for file in ("report.md", "report.html"):
        assert "<script>" not in (tmp_path / "out" / file).read_text(encoding="utf-8").replace("`" + name, "")
