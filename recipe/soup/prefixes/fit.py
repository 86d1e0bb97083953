"""What a checkpoint's prefixes are worth under settings that have changed since: used, shortened, or dropped."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.prefixes.plan import Limits, RunFacts, limits, plan_prompt
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import target_version
from recipe.soup.settings import SoupSettings

Judge = Callable[[int, int, Prefix], Prefix | str]
"""From prompt, slot and prefix to the prefix, a shorter one, or why it does not fit."""

SLOTS = "of slots that there are no more"
OLD = "older than the lag"
LONG = "longer than a response"
POLICY = "of another policy"
LATE = "for steps that the run has not"
CUT = "cut"
"""Counted under this: a prefix that is used and was shortened."""


def lengths_among(changed: Iterable[str]) -> bool:
    """Whether one of these keys says how long prefixes may be."""
    return any("prefix_length" in name or "response_length" in name for name in changed)


def fit(bank: PrefixBank, judge: Judge) -> Counter[str]:
    """Drop and shorten what does not fit; returns how many, by what was wrong with them."""
    told: Counter[str] = Counter()
    for prompt, slot, prefix in list(bank.items()):
        verdict = judge(prompt, slot, prefix)
        if isinstance(verdict, str):
            bank.drop(prompt, slot)
            told[verdict] += 1
        elif verdict is not prefix:
            bank.put(prompt, slot, verdict)
            told[CUT] += 1
    return told


def by_plan(
    settings: SoupSettings, facts: RunFacts, place: tuple[int, int], typical: Mapping[int, float], cut: bool
) -> Judge:
    """Judge prefixes that are kept by the ordinals of their prompts, each by its prompt's plan.

    Args:
        place: the first prompt that was not trained on, and the step that will.
        typical: length of a response, by ordinal.
        cut: whether what prefixes may be long has changed.
    """
    first, step = place
    whole = settings.prefix_length.distribution == "whole"

    def judge(ordinal: int, slot: int, prefix: Prefix) -> Prefix | str:
        trained_in = step + (ordinal - first) // facts.prompts_per_step
        if trained_in > facts.last_step or ordinal not in typical:
            return LATE
        plan = plan_prompt(settings, facts, ordinal, typical[ordinal])
        if slot >= len(plan.lengths):
            return SLOTS
        if settings.source == "lookahead":  # `snapshot` chooses a version when it samples, not by the prompt
            version = target_version(trained_in, plan.steps_ahead, settings.warm_start)
            if version is None or prefix.oldest < version:
                return OLD
        longest = limits(settings, facts, ordinal // facts.prompts_per_step + 1, typical[ordinal]).longest
        return shortened(prefix, longest, whole) if cut else prefix

    return judge


def by_epoch(settings: SoupSettings, facts: RunFacts, step: int, typical: Callable[[int], float], cut: bool) -> Judge:
    """Judge prefixes that are kept by the fingerprints of their prompts, which come again within an epoch.

    Args:
        step: the first one of the resumed run.
        typical: length of a response, by fingerprint.
        cut: whether what prefixes may be long has changed.
    """
    steps = (step, step + facts.prompts_per_epoch // facts.prompts_per_step)
    whole = settings.prefix_length.distribution == "whole"

    def allowed(prompt: int) -> list[Limits]:
        return [limits(settings, facts, at, typical(prompt)) for at in steps]

    def judge(prompt: int, slot: int, prefix: Prefix) -> Prefix | str:
        within = allowed(prompt)
        if slot >= max(math.ceil(limit.prefixes) for limit in within):
            return SLOTS
        return shortened(prefix, max(limit.longest for limit in within), whole) if cut else prefix

    return judge


def shortened(prefix: Prefix, longest: int, whole: bool) -> Prefix | str:
    """Return a prefix of at most so many tokens: the beginning of a sample is one, of the same policy.

    Args:
        whole: whether prefixes are whole responses, which have no beginning that is one.
    """
    if len(prefix) <= longest:
        return prefix
    return LONG if whole else prefix.first(longest)
