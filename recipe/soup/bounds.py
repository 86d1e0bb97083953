"""The bounds of every key under `algorithm.soup`, and the few defaults that depend on other keys.

Each check raises a SystemExit with one sentence.
"""

from typing import Any

from recipe.soup.algorithm.baselines import BASELINES
from recipe.soup.algorithm.losses.registry import RATIOS
from recipe.soup.errors import refuse
from recipe.soup.settings import ScheduleSettings, SoupSettings

CHOICES: dict[str, tuple[str, ...]] = {
    "source": ("lookahead", "snapshot", "replay"),
    "lag_distribution": ("fixed", "uniform", "geometric"),
    "prefix_length.distribution": ("uniform", "fixed", "beta", "whole"),
    "prefix_length.unit": ("tokens", "fraction"),
    "selection": ("random", "failed", "successful", "entropic"),
    "schedules.mixed_share.shape": ("constant", "linear", "cosine"),
    "schedules.prefix_length.shape": ("constant", "linear", "cosine"),
    "schedules.lag.shape": ("constant", "linear", "cosine"),
    "warm_start": ("pure", "fill", "ramp"),
    "on_eos": ("keep", "cut"),
    "behavior_log_probs": ("auto", "rollout", "trainer"),
    "ratio": tuple(RATIOS),
    "loss_tokens": ("all", "trained"),
    "baseline": tuple(BASELINES),
    "snapshot.eviction": ("oldest", "log_spaced"),
    "snapshot.storage": ("memory", "disk"),
    "snapshot.placement": ("colocated", "standalone"),
}


def _get(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def _demand(settings: SoupSettings, key: str, holds: bool, why: str) -> None:
    if not holds:
        raise refuse(f"algorithm.soup.{key}", _get(settings, key), why)


def check_bounds(settings: SoupSettings, response_length: int) -> None:
    """Check every key by itself and against the others.

    Args:
        response_length: `data.max_response_length`, in tokens.

    Raises:
        SystemExit: which key, which value, what to do.
    """
    for key, choices in CHOICES.items():
        _demand(settings, key, _get(settings, key) in choices, f"choose one of {', '.join(choices)}.")
    _demand(settings, "mixed_share", 0 <= settings.mixed_share <= 1, "a share lies between 0 and 1.")
    _demand(settings, "lag", settings.lag >= 0, "a lag counts updates back in time; use 0 or more.")
    per_prefix = settings.samples_per_prefix
    _demand(settings, "samples_per_prefix", per_prefix >= 1, "a prefix has one sample or more.")
    rows, lost = settings.dump_rows, settings.max_lost_share
    _demand(settings, "dump_rows", rows is None or rows >= 1, "use 1 or more samples a step, or null for all.")
    _demand(settings, "max_lost_share", 0 <= lost <= 1, "a share lies between 0 (none) and 1 (all).")
    _check_loss(settings)
    _check_schedules(settings)
    _check_selection(settings)
    _check_snapshots(settings)
    _check_lengths(settings, response_length)


def _check_loss(settings: SoupSettings) -> None:
    clip, gradient, budget = settings.prefix_clip, settings.prefix_gradient, settings.second_moment
    _demand(settings, "shaping_gamma", settings.shaping_gamma > 0, "r/(r+gamma) needs a number above 0.")
    _demand(settings, "prefix_clip.low", clip.low is None or clip.low >= 0, "use 0 or more, inf for no clip.")
    _demand(settings, "prefix_clip.high", clip.high is None or clip.high >= 0, "use 0 or more, inf for no clip.")
    clips = RATIOS[settings.ratio].clips_prefix
    for side in ("low", "high"):
        set_for_nothing = _get(clip, side) is not None and not clips
        _demand(settings, f"prefix_clip.{side}", not set_for_nothing, f"ratio={settings.ratio} has no clip; drop it.")
    _demand(settings, "prefix_gradient", 0 <= gradient <= 1, "a share lies between 0 (none) and 1 (all).")
    _demand(settings, "second_moment", budget is None or budget > 0, "a budget is above 0; null for none.")
    useless = gradient == 0 and settings.prefix_length.distribution == "whole"
    _demand(settings, "prefix_gradient", not useless, "samples that are all prefix would teach nothing.")
    behavior_needed = settings.behavior_log_probs == "trainer" and settings.source == "snapshot"
    _demand(
        settings,
        "behavior_log_probs",
        not behavior_needed,
        "with source=snapshot the trainer no longer holds the weights that sample; use auto or rollout.",
    )
    sharing = settings.baseline != "two_level" or settings.samples_per_prefix > 1
    _demand(
        settings,
        "baseline",
        sharing,
        "compares samples that share a prefix; set algorithm.soup.samples_per_prefix to 2 or more.",
    )


def _check_schedules(settings: SoupSettings) -> None:
    for name in ("mixed_share", "prefix_length", "lag"):
        key = f"schedules.{name}"
        schedule: ScheduleSettings = _get(settings, key)
        moves = schedule.shape != "constant"
        _demand(settings, f"{key}.end", moves == (schedule.end is not None), "give it with linear or cosine only.")
        for_nothing = schedule.steps is not None and not moves
        _demand(settings, f"{key}.steps", not for_nothing, "give it with linear or cosine only.")
        fits = schedule.steps is None or schedule.steps > schedule.warmup + 1
        _demand(settings, f"{key}.steps", fits, f"use more than {key}.warmup + 1 = {schedule.warmup + 1} steps.")
        _demand(settings, f"{key}.warmup", schedule.warmup >= 0, "counts steps; use 0 or more.")
    lag, aged = settings.schedules.lag, settings.source != "replay"
    _demand(settings, "schedules.lag.shape", aged or lag.shape == "constant", "source=replay has no lag; drop it.")
    drawn = settings.lag_distribution != "fixed"
    _demand(settings, "lag_distribution", aged or not drawn, "source=replay has no lag; use fixed.")
    end = settings.schedules.mixed_share.end
    _demand(settings, "schedules.mixed_share.end", end is None or 0 <= end <= 1, "a share lies between 0 and 1.")
    end = settings.schedules.lag.end
    _demand(settings, "schedules.lag.end", end is None or end >= 0, "a lag counts updates; use 0 or more.")


def _check_selection(settings: SoupSettings) -> None:
    replay, by_reward = settings.source == "replay", settings.selection in ("failed", "successful")
    _demand(
        settings,
        "selection",
        replay or not by_reward,
        "a prefix has no reward before its response is complete; use source=replay.",
    )
    _demand(settings, "candidates", settings.candidates >= 1, "sample at least 1.")
    chooses = settings.selection == "entropic" and not replay
    _demand(
        settings,
        "candidates",
        chooses == (settings.candidates > 1),
        "selection=entropic chooses among 2 or more (but source=replay among a visit's responses); otherwise use 1.",
    )


def _check_lengths(settings: SoupSettings, response_length: int) -> None:
    length = settings.prefix_length
    _demand(settings, "prefix_length.alpha", length.alpha > 0, "use a number above 0.")
    _demand(settings, "prefix_length.beta", length.beta > 0, "use a number above 0.")
    if length.distribution == "whole":
        _demand(settings, "on_eos", settings.on_eos == "keep", "prefix_length.distribution=whole needs `keep`.")
        schedule = settings.schedules.prefix_length
        moves = schedule.shape != "constant" or schedule.warmup > 0
        _demand(
            settings, "prefix_length.distribution", not moves, "has no length that schedules.prefix_length could move."
        )
        alone = settings.samples_per_prefix == 1
        _demand(settings, "samples_per_prefix", alone, "samples that share a whole response are equal; use 1.")
        length.unit, length.min, length.max = "tokens", response_length, response_length
        return
    fraction = length.unit == "fraction"
    if length.min is None:
        length.min = 0.0 if fraction else 1
    if length.max is None:
        length.max = 0.5 if fraction else max(response_length // 2, 1)
    if not settings.mixes:
        return
    if fraction:
        _demand(settings, "prefix_length.max", 0 < length.max <= 1, "a fraction lies above 0 and up to 1.")
        _demand(settings, "prefix_length.min", 0 <= length.min <= length.max, "a fraction lies from 0 to max.")
    else:
        longest = (
            f"a prefix has 1 to data.max_response_length - 1 = {response_length - 1} tokens, so that the current "
            "policy has one left to write."
        )
        _demand(settings, "prefix_length.max", 1 <= length.max <= response_length - 1, longest)
        shortest = f"use 1 to prefix_length.max = {length.max:g} tokens."
        _demand(settings, "prefix_length.min", 1 <= length.min <= length.max, shortest)
    end = settings.schedules.prefix_length.end
    limit = 1 if fraction else response_length - 1
    _demand(
        settings, "schedules.prefix_length.end", end is None or 0 <= end <= limit, f"use 0 to {limit}, as for its max."
    )


def _check_snapshots(settings: SoupSettings) -> None:
    snapshot = settings.snapshot
    _demand(settings, "snapshot.every", snapshot.every >= 1, "a snapshot is taken every 1 or more updates.")
    share, sequences = snapshot.gpu_memory_utilization, snapshot.max_num_seqs
    _demand(
        settings,
        "snapshot.gpu_memory_utilization",
        share is None or 0 < share <= 1,
        "a share lies above 0 and up to 1.",
    )
    _demand(settings, "snapshot.max_num_seqs", sequences is None or sequences >= 1, "decode at least 1 at once.")
    lagged = snapshot.policy == "lagged"
    _demand(
        settings,
        "snapshot.eviction",
        not lagged or snapshot.eviction == "oldest",
        "with policy=lagged the age would wander; use policy=pool, or eviction=oldest.",
    )
    needed = snapshot.needed(settings.largest_lag)
    if snapshot.keep is None:
        snapshot.keep = needed
    _demand(settings, "snapshot.keep", snapshot.keep >= 1, "keep at least 1.")
    _demand(
        settings,
        "snapshot.keep",
        not lagged or snapshot.keep >= needed,
        f"with lag={settings.largest_lag} and every={snapshot.every} the snapshot that is old enough would be gone; "
        f"keep {needed} or more, or take them less often.",
    )
