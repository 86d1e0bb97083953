"""The recipe's table of neighbouring methods: each row is a configuration that is accepted."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from recipe.soup.checks.losses import check_loss
from recipe.soup.run_settings import run_settings

GROUPS = ("algorithm.", "actor_rollout_ref.")
README = Path(__file__).parents[4] / "recipe" / "soup" / "README.md"


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
    assert len(rows()) == 13


@pytest.mark.parametrize("method", rows())
def test_each_neighbour_is_accepted(method: str, composed: Callable[..., DictConfig]) -> None:
    config = composed("algorithm=soup", *rows()[method])
    settings = run_settings(config)
    if settings.mixes:
        check_loss(config, settings)
    assert settings.mixes == (method != "GRPO")
