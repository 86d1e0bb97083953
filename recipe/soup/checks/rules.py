"""Keys that must have certain values, whatever the reason."""

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import refuse

Rule = tuple[str, tuple[Any, ...], str]
"""Key, allowed values (the first is the one to set), and why others are refused. A missing key is allowed."""


def check_rules(config: DictConfig, rules: Iterable[Rule], instead: str = "") -> None:
    """Check each rule.

    Args:
        instead: what else may be done, behind "set it to ...".

    Raises:
        SystemExit: key, value, why and what to do.
    """
    for key, allowed, why in rules:
        value = OmegaConf.select(config, key, default=allowed[0])
        if value not in allowed:
            fits = "null" if allowed[0] is None else allowed[0]
            raise refuse(key, value, f"{why}; set it to {fits}{instead}.")
