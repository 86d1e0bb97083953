"""Speculative verification of a stored response: which of its tokens the current policy keeps (SPEC-RL).

mu sampled the response and pi is the current policy; both are log-probs at the rollout's temperature.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recipe.soup.prefixes.files import read_arrays, write_arrays

VERIFIED_FILE = "soup_verified.npz"


def accepted(now: np.ndarray, then: np.ndarray, leniency: float, draws: np.ndarray) -> int:
    """Return how many tokens come before the first one with u > min(1, l pi/mu).

    Args:
        now, then: log pi and log mu of the response's tokens, shape (response_length,).
        leniency: l; SPEC-RL has e^.5, and 1 is the rule of speculative sampling.
        draws: u, from [0, 1), shape (response_length,).
    """
    with np.errstate(divide="ignore"):  # a draw of 0, and a leniency of inf
        kept = np.log(draws) <= np.log(leniency) + (now.astype(np.float64) - then.astype(np.float64))
    # In this order a log-prob that is no number keeps nothing.
    return len(draws) if kept.all() else int(kept.argmin())


def residual(now: np.ndarray, then: np.ndarray) -> np.ndarray:
    """Return (pi - mu)_+ as probabilities: what the token in a rejected one's place has to be drawn from (at l = 1).

    Args:
        now, then: log pi and log mu of every token that could stand there, shape (vocabulary,).
    """
    policy = np.exp(now.astype(np.float64))
    mass = np.maximum(policy - np.exp(then.astype(np.float64)), 0.0)
    # Where the two are equal but for rounding, nothing may be left.
    mass = mass if mass.sum() > 0 else policy
    return mass / mass.sum()


def drawn_from(probabilities: np.ndarray, draw: float) -> int:
    """Return the token at `draw`, from [0, 1), of the cumulated probabilities."""
    place = int(np.searchsorted(probabilities.cumsum(), draw, side="right"))
    return min(place, int(probabilities.nonzero()[0][-1]))


@dataclass
class Beside:
    """What is kept beside a prompt's stored responses.

    Attributes:
        prompt_ids: int32, shape (prompt_length,).
        distributions: by slot, log mu of every token at each place, shape (response_length, vocabulary); only where
            rejected tokens are replaced exactly.
    """

    prompt_ids: np.ndarray
    distributions: dict[int, np.ndarray] = field(default_factory=dict)


def save_beside(folder: Path, kept: dict[int, Beside]) -> None:
    """Write this into a checkpoint's folder, as plain arrays."""
    whole = [(prompt, slot, values) for prompt, one in kept.items() for slot, values in one.distributions.items()]
    write_arrays(
        folder / VERIFIED_FILE,
        prompts=np.array([(prompt, len(one.prompt_ids)) for prompt, one in kept.items()], np.int64).reshape(-1, 2),
        prompt_ids=np.concatenate([one.prompt_ids for one in kept.values()] or [np.empty(0, np.int32)]),
        table=np.array([(prompt, slot, len(values)) for prompt, slot, values in whole], np.int64).reshape(-1, 3),
        distributions=np.concatenate([values for *_, values in whole] or [np.empty((0, 0), np.float32)]),
    )


def load_beside(folder: Path) -> dict[int, Beside]:
    """Read what `save_beside` wrote, by prompt.

    Raises:
        UnreadableError: it cannot be read.
    """
    with read_arrays(folder / VERIFIED_FILE) as arrays:
        prompts, table = arrays["prompts"].tolist(), arrays["table"].tolist()
        prompt_ids, distributions = arrays["prompt_ids"], arrays["distributions"]
    kept, place = {}, 0
    for prompt, tokens in prompts:
        kept[prompt] = Beside(prompt_ids[place : place + tokens])
        place += tokens
    place = 0
    for prompt, slot, tokens in table:
        kept[prompt].distributions[slot] = distributions[place : place + tokens]
        place += tokens
    return kept
