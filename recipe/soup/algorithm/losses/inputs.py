"""What a loss is computed from, and what it gives."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clip:
    """Clip ranges of the ratio around 1, by segment; `inf` for none.

    Attributes:
        low, high: on tokens of the current version; verl's `clip_ratio_low` and `clip_ratio_high`.
        prefix_low, prefix_high: on the prefix (the paper does not say whether it has its own).
        dual: PPO's dual clip, on both: for a negative advantage the ratio counts up to this; verl's `clip_ratio_c`.
    """

    low: float
    high: float
    prefix_low: float
    prefix_high: float
    dual: float


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch; tensors are (batch, response_length).

    Attributes:
        log_probs: under the policy that is being updated; carries the gradient.
        old_log_probs: what the ratio is taken against: on each token of the policy that sampled it, or on all tokens
            of the current policy at rollout time (`Ratio.splices`).
        advantages: of each token.
        prefix: bool, tokens older than the step's version, and those of demonstrations.
        clip: clip ranges.
        gamma: of the shaped ratios.
        nll_coefficient: of `ratio=nll`.
    """

    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    prefix: torch.Tensor
    clip: Clip
    gamma: float = 0.1
    nll_coefficient: float = 1.0


@dataclass(frozen=True)
class LossOutputs:
    """Per token, (batch, response_length); neither masked nor averaged.

    Attributes:
        losses: to be minimised; carries the gradient.
        mass: size of the gradient with respect to the token's log-prob, had nothing been clipped.
        clipped_low, clipped_high, clipped_dual: bool, where a clip leaves no gradient.
    """

    losses: torch.Tensor
    mass: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    clipped_dual: torch.Tensor
