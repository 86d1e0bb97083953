"""One training batch as the mathematics sees it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

NOBODY = -2
"""The version of tokens of which no policy is known: what tools answered, and demonstrations."""


@dataclass(frozen=True)
class TrainRows:
    """One training batch; (batch, response_length) unless stated. Rows that are no samples have an empty mask.

    Attributes:
        response_mask: bool, sampled tokens; between the turns of a response there may be others.
        response_ids: int, the tokens.
        is_historical: bool, those older than the step's version.
        policy_versions: int, the version that sampled each token, or `NOBODY`.
        behavior_log_probs: as recorded when each token was sampled.
        current_log_probs: the trainer's at the start of the update, before the splice.
        entropy: nats, under the current policy.
        rewards: (batch,), sum over the response.
        uids: (batch,), the group that each row belongs to.
        current_version: version that the step rolled out with.
    """

    response_mask: torch.Tensor
    response_ids: torch.Tensor
    is_historical: torch.Tensor
    policy_versions: torch.Tensor
    behavior_log_probs: torch.Tensor
    current_log_probs: torch.Tensor
    entropy: torch.Tensor
    rewards: torch.Tensor
    uids: Sequence[Hashable]
    current_version: int

    @property
    def is_demonstration(self) -> torch.Tensor:
        """Response tokens of a data set; what tools answered is masked out."""
        return (self.policy_versions == NOBODY) & self.response_mask

    @property
    def is_prefix(self) -> torch.Tensor:
        """Tokens that the step's policy was given: of the past, or of a demonstration."""
        return self.is_historical | self.is_demonstration


def prefix_mask(policy_versions: torch.Tensor, response_mask: torch.Tensor, current_version: int) -> torch.Tensor:
    """Response tokens that are older than the step's own version.

    Args:
        policy_versions: (batch, response_length), the version that sampled each token; anything where masked out.
        response_mask: (batch, response_length), 1 on sampled tokens; rows that are no samples are all 0.
        current_version: version that the step rolls out with, `step - 1`.

    Returns:
        bool, (batch, response_length).
    """
    return (policy_versions < current_version) & (policy_versions != NOBODY) & response_mask.bool()


def splice_behavior_log_probs(
    current_log_probs: torch.Tensor, behavior_log_probs: torch.Tensor, prefix: torch.Tensor
) -> torch.Tensor:
    """Old log-probs of `ratio=behavior`: log mu_t, where mu is the historical policy on the prefix (the paper's).

    Args:
        current_log_probs: (batch, response_length), the trainer's, under the current policy at rollout time.
        behavior_log_probs: (batch, response_length), recorded when each token was sampled.
        prefix: bool, (batch, response_length), from `prefix_mask`.

    Returns:
        (batch, response_length); bit-identical to `current_log_probs` where `prefix` is False.
    """
    return torch.where(prefix, behavior_log_probs, current_log_probs)
