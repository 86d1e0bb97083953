"""Draw what one prompt's mixed samples shall look like: how many prefixes, how long, how old."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recipe.soup.prefixes.schedules import lag_at, value_at
from recipe.soup.settings import PrefixLengthSettings, SoupSettings


@dataclass(frozen=True)
class RunFacts:
    """What a source must know about the run.

    Attributes:
        samples: `rollout.n`.
        response_length: `data.max_response_length`, in tokens.
        seed: seed of everything that is drawn.
        prompts_per_step: `data.train_batch_size`.
        last_step: the run's last step.
        prompts_per_epoch: prompts after which they come again; 0 if they never do.
        origin: what shapes the run's prefixes, by the names of its keys; a checkpoint says it to who goes on with it.
    """

    samples: int
    response_length: int
    seed: int
    prompts_per_step: int
    last_step: int
    prompts_per_epoch: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptPlan:
    """What was drawn for one prompt.

    Attributes:
        lengths: length of each prefix in tokens, by slot.
        steps_ahead: how many steps before the prompt's own they are sampled; with `lookahead`, the lag.
    """

    lengths: list[int]
    steps_ahead: int


@dataclass(frozen=True)
class Limits:
    """What a step's settings allow a prompt.

    Attributes:
        prefixes: how many, in the mean.
        shortest, longest: length of a prefix in tokens.
    """

    prefixes: float
    shortest: int
    longest: int


def limits(settings: SoupSettings, facts: RunFacts, step: int, typical_length: float) -> Limits:
    """Return how many prefixes a prompt of this step gets, and how long they may be.

    Args:
        typical_length: see `plan_prompt`.
    """
    share = value_at(settings.schedules.mixed_share, settings.mixed_share, step, facts.last_step)
    length = settings.prefix_length
    assert length.min is not None
    assert length.max is not None
    high = value_at(settings.schedules.prefix_length, length.max, step, facts.last_step)
    unit = typical_length if length.unit == "fraction" else 1.0
    longest = facts.response_length - (length.distribution != "whole")
    shortest, high = (min(max(round(bound * unit), 1), longest) for bound in (min(length.min, high), high))
    return Limits(facts.samples * share / settings.samples_per_prefix, shortest, high)


def plan_prompt(settings: SoupSettings, facts: RunFacts, ordinal: int, typical_length: float) -> PromptPlan:
    """Draw lag and prefix lengths of the prompt at this place in the data.

    The number of prefixes is `samples * mixed_share / samples_per_prefix`, rounded up or down by chance if it is no
    whole number. The draw depends only on the seed, the prompt's place in the data order and, if lengths are fractions,
    on `typical_length`, so a resumed run draws the same.

    Args:
        ordinal: the prompt's place in the order of training, from 0; it gives the step for the schedules.
        typical_length: length of a response to this prompt in tokens, as far as it is known.
    """
    rng = np.random.default_rng([facts.seed, ordinal])
    step = ordinal // facts.prompts_per_step + 1
    allowed = limits(settings, facts, step, typical_length)
    count = int(allowed.prefixes + rng.random())
    lengths = draw_lengths(settings.prefix_length, allowed.shortest, allowed.longest, count, rng)
    # From a stream of its own, since lengths may depend on more than the seed and the place.
    lag = lag_at(settings, step, facts.last_step, np.random.default_rng([facts.seed, ordinal, 4]))
    return PromptPlan(lengths, lag)


def draw_lengths(
    settings: PrefixLengthSettings, shortest: int, longest: int, count: int, rng: np.random.Generator
) -> list[int]:
    """Draw `count` prefix lengths in tokens, from `shortest` to `longest`, both included."""
    if settings.distribution == "beta":
        shares = rng.beta(settings.alpha, settings.beta, size=count)
        return (shortest + np.rint(shares * (longest - shortest))).astype(int).tolist()
    low = shortest if settings.distribution == "uniform" else longest
    return rng.integers(low, longest, size=count, endpoint=True).tolist()
