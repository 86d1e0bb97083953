"""DAPO's filter (`algorithm.filter_groups`) as verl's replay buffer has it: groups without a signal are replaced."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from omegaconf import DictConfig

from recipe.soup.lab.rollout import Group

EVICTED = "training/filter_groups/evicted_samples"
SURPLUS = "training/filter_groups/discarded_surplus_samples"
"""verl's metrics; both count groups."""


@dataclass
class Filtered:
    """What a step got.

    Attributes:
        groups: those that it trains on.
        dropped: those that it never trains on: without a signal, or too many.
        metrics: under verl's names, as far as there is something to tell.
    """

    groups: list[Group]
    dropped: list[Group] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def filters(config: DictConfig) -> bool:
    """Whether groups without a signal are replaced."""
    chosen = config.algorithm.filter_groups
    return chosen is not None and chosen.enable


def has_signal(group: Group, metric: str) -> bool:
    """Whether the samples differ in the metric; a group of one, or of none, is kept as verl keeps it."""
    values = [told["score" if metric == "reward" else metric] for told in group.told]
    return len(values) < 2 or float(np.std(np.array(values, dtype=float))) > 0


def filled(groups: list[Group], config: DictConfig, refill: Callable[[int], list[Group]]) -> Filtered:
    """Replace groups without a signal until a step has as many as it wants.

    verl asks for two prompts for each that it evicts, as long as it has not enough, and has at most
    `max_inflight_gen_batches` steps' prompts under way; what is too many in the end is discarded. It looks while
    samples arrive, and here all of them arrive at once.

    Args:
        groups: of the prompts that the step began with, as many as it wants.
        config: verl's whole config.
        refill: rolls out so many further prompts.

    Raises:
        KeyError: a reward does not tell the metric that is filtered by.
    """
    chosen = config.algorithm.filter_groups
    wanted, most = len(groups), chosen.get("max_inflight_gen_batches", 1) * config.data.train_batch_size
    kept: list[Group] = []
    dropped: list[Group] = []
    credit = 0
    while True:
        before = len(dropped)
        for group in groups:
            (kept if has_signal(group, chosen.metric) else dropped).append(group)
        credit += 2 * (len(dropped) - before)
        if len(kept) >= wanted:
            break
        asked = min(credit, most)
        credit -= asked
        groups = refill(asked)
    metrics = {EVICTED: float(len(dropped)), SURPLUS: float(len(kept) - wanted)}
    told = {name: value for name, value in metrics.items() if value}
    return Filtered(kept[:wanted], dropped + kept[wanted:], told)
