"""What checks, the lab and the tools need of verl: reward functions as it loads them."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from zlib import crc32

from recipe.soup.errors import refuse
from recipe.soup.records.problems import Problem

Reward = Callable[[Problem, str], dict[str, Any]]
"""Of a problem and a response's text: `score`, and whatever else the reward function tells (`acc`, `pred`)."""


def load_reward(path: str, name: str = "compute_score") -> Reward:
    """A reward function of verl's form, from a module (`pkg://package.module`) or a file.

    Raises:
        SystemExit: there is none; one sentence.
    """
    from verl.utils.import_utils import load_extern_object  # takes seconds, which commands without rewards spare

    try:
        compute: Any = load_extern_object(path, name)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise refuse("reward", f"{path}:{name}", f"cannot be loaded ({error}).") from error

    @wraps(compute)
    def reward(problem: Problem, text: str) -> dict[str, Any]:
        score = compute(problem.data_source, text, problem.ground_truth, problem.extra_info)
        return score if isinstance(score, dict) else {"score": score}

    return reward


def source_of(reward: Reward) -> str:
    """A checksum of the file in which the reward function stands: an edited one grades anew."""
    file = inspect.getsourcefile(inspect.unwrap(reward))
    return f"{crc32(Path(file).read_bytes()):08x}" if file else ""
