"""A reward is one finite number; anything else is a reward that failed, and its sample is lost like any other.

verl would take NaN into the batch, whose whole group then has no advantage that is a number, and go on without updates.
"""

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

SHOWN = 70
"""Most characters of a text in a sentence."""
TAKEN = ("reward", "input", "output", "gts", "step", "uid")
"""Names in verl's validation: a value that a reward tells as `reward` would stand behind the score in its list, and the
others would take the place of what is dumped."""


def shown(value: Any) -> str:
    """A value in one line, its middle left out if it is long."""
    text = repr(value)
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} ... {text[-half:]}"


def number(value: Any) -> float | None:
    """The value as a number, also out of an array or a tensor of one element; None if it is none."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    return float(value) if isinstance(value, numbers.Real | np.bool_) else None


def graded(value: Any, sample: Callable[[], tuple[Any, Any]]) -> float:
    """Take a reward, as a reward function or whoever stands in its place returned it.

    Args:
        value: the reward.
        sample: its prompt and response for the sentence, asked for only if the reward failed.

    Raises:
        ValueError: it is not one number that float32, in which verl keeps rewards, has as well.
    """
    reward = number(value)
    if reward is None or not abs(reward) <= torch.finfo(torch.float32).max:  # NaN is not less than anything
        prompt, response = map(shown, sample())
        raise ValueError(f"the reward {shown(value)} is not one finite number (prompt {prompt}, response {response})")
    return reward


def told(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a reward function told beside the score, fit for verl: numbers as plain ones, names that are free."""
    plain = {str(key): value.item() if isinstance(value, np.generic) else value for key, value in info.items()}
    return {f"told_{key}" if key in TAKEN else key: value for key, value in plain.items()}


def measurable(columns: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], list[str]]:
    """Split what rewards told in a validation into what verl's metrics can read, and the names of the rest.

    verl takes means of all that is not text, and votes on `pred`. Values may be missing (None), since what a reward
    tells may differ between samples.

    Args:
        columns: values of each name, one for each sample.
    """
    fit: dict[str, list[Any]] = {}
    for name, values in columns.items():
        present = [value for value in values if value is not None]
        if name == "pred":
            fit[name] = [None if value is None else str(value) for value in values]
        elif all(isinstance(value, str) for value in present):
            fit[name] = values
        elif all(number(value) is not None for value in present):
            fit[name] = [None if value is None else number(value) for value in values]
    return fit, [name for name in columns if name not in fit]
