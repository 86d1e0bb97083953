"""Baselines by name (`algorithm.soup.baseline`): what each sample's reward is compared with.

All of them only choose who is in a group; what is done within a group is verl's estimator (`algorithm.adv_estimator`).
A new one is a function from `AdvantageInputs` to advantages, and one line in `BASELINES`.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from recipe.soup.algorithm.batch import TrainRows

Estimate = Callable[[torch.Tensor, Sequence[Hashable]], torch.Tensor]
"""From rewards (samples,) and the group of each to advantages (samples,)."""


@dataclass(frozen=True)
class AdvantageInputs:
    """One training batch without rows that are no samples.

    Attributes:
        rewards: (batch,), of the whole response.
        prompts: the prompt of each sample.
        prefix: bool, (batch, response_length), tokens older than the step's version, or of a demonstration.
        response_ids: (batch, response_length); anything behind the prefix.
        estimate: advantages within groups.
    """

    rewards: torch.Tensor
    prompts: Sequence[Hashable]
    prefix: torch.Tensor
    response_ids: torch.Tensor
    estimate: Estimate

    def of_groups(self, groups: Sequence[Hashable]) -> torch.Tensor:
        """Advantages (batch,) within these groups; a sample that is alone in its group keeps its prompt's baseline."""
        sizes = Counter(groups)
        alone = torch.tensor([sizes[group] == 1 for group in groups])
        return torch.where(alone, self.estimate(self.rewards, self.prompts), self.estimate(self.rewards, groups))


def group(inputs: AdvantageInputs) -> torch.Tensor:
    """One group per prompt, mixed and pure samples together, as in GRPO (the default; the paper does not say).

    Returns:
        (batch, response_length).
    """
    return inputs.estimate(inputs.rewards, inputs.prompts)[:, None].expand(inputs.prefix.shape)


def separate(inputs: AdvantageInputs) -> torch.Tensor:
    """Mixed samples are compared with mixed ones, pure with pure: neither pays for what the prefix does to the reward.

    Returns:
        (batch, response_length).
    """
    mixed = inputs.prefix.any(dim=1).tolist()
    return inputs.of_groups(list(zip(inputs.prompts, mixed, strict=True)))[:, None].expand(inputs.prefix.shape)


def two_level(inputs: AdvantageInputs) -> torch.Tensor:
    """For samples that share prefixes: prefix tokens are compared between prefixes, all others within one.

    Within samples that share it, a prefix's gradients would cancel. Between: each prefix counts once, with the mean
    reward of its samples. Pure samples share the empty prefix.

    Returns:
        (batch, response_length).
    """
    nodes: list[Hashable] = [
        (prompt, tuple(ids[is_prefix].tolist()))
        for prompt, ids, is_prefix in zip(inputs.prompts, inputs.response_ids, inputs.prefix, strict=True)
    ]
    first = {node: row for row, node in reversed(list(enumerate(nodes)))}
    at = {node: index for index, node in enumerate(first)}
    node_of = torch.tensor([at[node] for node in nodes])
    sizes = node_of.bincount()

    def mean_of_nodes(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(first)).index_add(0, node_of, values) / sizes

    mixed = inputs.prefix.any(dim=1).tolist()
    # The empty prefix has no tokens, so it is in a group of its own.
    groups = [(inputs.prompts[row], mixed[row]) for row in first.values()]
    prefixes = Counter(groups)
    alone = torch.tensor([prefixes[group] == 1 for group in groups])
    # A prefix that is its prompt's only one is compared with all the prompt's samples.
    of_prompt = mean_of_nodes(inputs.estimate(inputs.rewards, inputs.prompts))
    between = torch.where(alone, of_prompt, inputs.estimate(mean_of_nodes(inputs.rewards), groups))
    return torch.where(inputs.prefix, between[node_of][:, None], inputs.of_groups(nodes)[:, None])


BASELINES: dict[str, Callable[[AdvantageInputs], torch.Tensor]] = {
    "group": group,
    "separate": separate,
    "two_level": two_level,
}


def compare(rows: TrainRows, baseline: str, estimate: Estimate) -> torch.Tensor:
    """Compute the advantages of a batch by the name of the baseline.

    Returns:
        (batch, response_length), 0 where masked out.
    """
    samples = rows.response_mask.any(dim=1)
    inputs = AdvantageInputs(
        rewards=rows.rewards[samples],
        prompts=[uid for uid, is_sample in zip(rows.uids, samples.tolist(), strict=True) if is_sample],
        prefix=rows.is_prefix[samples],
        response_ids=rows.response_ids[samples],
        estimate=estimate,
    )
    advantages = torch.zeros_like(rows.current_log_probs)
    advantages[samples] = BASELINES[baseline](inputs)
    return advantages * rows.response_mask
