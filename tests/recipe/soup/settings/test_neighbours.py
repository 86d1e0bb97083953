"""The recipe's table of neighbouring methods: each row is a configuration that is accepted."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from omegaconf import DictConfig

from examples.countdown.build_data import to_row
from examples.countdown.task import random_problem, solutions
from recipe.soup.checks.config import check_config
from recipe.soup.checks.losses import check_loss
from recipe.soup.checks.start import check_start
from recipe.soup.lab.refusals import check_lab_config
from recipe.soup.run_settings import run_settings

GROUPS = ("algorithm.", "actor_rollout_ref.")
README = Path(__file__).parents[4] / "recipe" / "soup" / "README.md"
NEIGHBOURS = Path(__file__).parents[4] / "examples" / "neighbours"


def rows() -> dict[str, list[str]]:
    """Overrides by method; a key without a group of verl's is one of ours."""
    table = README.read_text().partition("### The neighbours as configurations")[2].partition("\n##")[0]
    found: dict[str, list[str]] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and "=" in cells[1]:
            given = " ".join(re.findall("`([^`]*)`", cells[1])).split()
            found[cells[0]] = [one if one.startswith(GROUPS) else f"algorithm.soup.{one}" for one in given]
    return found


def test_the_table_is_there() -> None:
    assert len(rows()) == 14


@pytest.mark.parametrize("method", rows())
def test_each_neighbour_is_accepted(method: str, composed: Callable[..., DictConfig]) -> None:
    config = composed("algorithm=soup", *rows()[method])
    settings = run_settings(config)
    if settings.mixes:
        check_loss(config, settings)
    assert settings.mixes == (method != "GRPO")


def demonstrated() -> dict[str, list[str]]:
    """Overrides of each row of examples/neighbours."""
    study = yaml.safe_load((NEIGHBOURS / "demonstrations.yaml").read_text())
    return {name: [*study["common"], *overrides] for name, overrides in study["runs"].items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the study, small."""
    folder = tmp_path_factory.mktemp("shown")
    rng = random.Random(0)
    problems = [random_problem(rng) for _ in range(64)]
    rows = [to_row(problem, index, solutions(problem)[:8]) for index, problem in enumerate(problems)]
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    pd.DataFrame(rows).to_parquet(folder / "val.parquet")
    return folder


@pytest.mark.parametrize("method", demonstrated())
def test_each_row_with_demonstrations_is_accepted_in_both_drivers(
    method: str, data: Path, composed: Callable[..., DictConfig]
) -> None:
    overrides = [override.replace("runs/countdown_shown", str(data)) for override in demonstrated()[method]]
    config = composed("hardware=cpu", *overrides)
    assert run_settings(config).demonstrates == (method != "grpo")
    for check in (check_config, check_lab_config, check_start):
        check(config)


def test_each_row_with_demonstrations_is_explained() -> None:
    page = (NEIGHBOURS / "README.md").read_text()
    sections = dict(zip(re.findall("^## (.*)$", page, re.MULTILINE), page.split("\n## ")[1:], strict=True))
    assert set(sections) == set(demonstrated()) - {"grpo"}
    for section in sections.values():
        assert re.search(r"\| as published \|.*From: (code|paper|second hand)\. \|\n\| not \|", section)
