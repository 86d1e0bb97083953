"""Compute settings that move over training, and draw lags."""

import math

import numpy as np

from recipe.soup.settings import ScheduleSettings, SoupSettings


def value_at(schedule: ScheduleSettings, start: float, step: int, last_step: int) -> float:
    """Return the value of a scheduled setting at a training step.

    Args:
        start: the setting itself: its value at step 1, or right after the warm-up.
        step: the step, from 1.
        last_step: the run's last step, where `schedule.steps` does not say otherwise.
    """
    if step <= schedule.warmup:
        return start * step / (schedule.warmup + 1)
    if schedule.shape == "constant":
        return start
    assert schedule.end is not None
    first, last = schedule.warmup + 1, schedule.steps or last_step
    progress = min((step - first) / max(last - first, 1), 1.0)
    if schedule.shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (schedule.end - start) * progress


def lag_at(settings: SoupSettings, step: int, last_step: int, rng: np.random.Generator) -> int:
    """Draw a lag, in updates.

    `uniform` and `geometric` draw from 1 to the scheduled lag; the probability of `geometric` halves with every quarter
    of that lag (our choice).

    Args:
        step: the step that trains on the prefix.
    """
    lag = round(value_at(settings.schedules.lag, settings.lag, step, last_step))
    if settings.lag_distribution == "fixed" or lag == 0:
        return lag
    lags = np.arange(1, lag + 1)
    weights = np.ones(lag) if settings.lag_distribution == "uniform" else 0.5 ** (4 * lags / lag)
    return int(rng.choice(lags, p=weights / weights.sum()))
