"""One training batch as the mathematics sees it. Pure torch, imports no verl."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainRows:
    """One training batch; (batch, response_length) unless stated. Rows that are no samples have an empty mask.

    Attributes:
        response_mask: bool, sampled tokens.
        prefix: bool, those older than the step's version.
        policy_versions: int, the version that sampled each token.
        behavior_log_probs: as recorded when each token was sampled.
        current_log_probs: the trainer's at the start of the update, before the splice.
        entropy: nats, under the current policy.
        rewards: (batch,), sum over the response.
        uids: (batch,), the group that each row belongs to.
        current_version: version that the step rolled out with.
    """

    response_mask: torch.Tensor
    prefix: torch.Tensor
    policy_versions: torch.Tensor
    behavior_log_probs: torch.Tensor
    current_log_probs: torch.Tensor
    entropy: torch.Tensor
    rewards: torch.Tensor
    uids: Sequence[Hashable]
    current_version: int
