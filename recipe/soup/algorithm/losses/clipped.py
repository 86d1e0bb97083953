"""The clipped surrogate, and the prefix with a ratio of one."""

from dataclasses import replace

import torch

from recipe.soup.algorithm.losses.inputs import LossInputs, LossOutputs

LOG_RATIO_LIMIT = 20.0
"""As in verl: keeps exp() finite."""


def ratios(inputs: LossInputs) -> torch.Tensor:
    """pi_theta / what the ratio is taken against; (batch, response_length), with gradient."""
    return (inputs.log_probs - inputs.old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped(inputs: LossInputs) -> LossOutputs:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), for A < 0 at most -dual A: PPO's objective, as verl computes it.

    The paper's objective where `old_log_probs` are those of the policy that sampled each token (`ratio=behavior`).
    Without a prefix it is verl's `vanilla` loss, bit for bit.
    """
    clip, prefix, advantages = inputs.clip, inputs.prefix, inputs.advantages
    ratio = ratios(inputs)
    finite = (inputs.log_probs - inputs.old_log_probs).abs() < LOG_RATIO_LIMIT
    low = torch.full_like(ratio, 1 - clip.low).masked_fill(prefix, 1 - clip.prefix_low)
    high = torch.full_like(ratio, 1 + clip.high).masked_fill(prefix, 1 + clip.prefix_high)
    free = -advantages * ratio
    held = -advantages * torch.clamp(ratio, low, high)
    single = torch.maximum(free, held)
    most = -advantages * clip.dual
    negative = advantages < 0
    is_held = held > free
    return LossOutputs(
        losses=torch.where(negative, torch.minimum(most, single), single),
        mass=free.detach().abs() * finite,
        clipped_low=is_held & negative,
        clipped_high=is_held & ~negative,
        clipped_dual=(single > most) & negative,
    )


def detached(inputs: LossInputs) -> LossOutputs:
    """On the prefix a ratio whose value is one: the gradient is A grad log pi, whatever the tokens' age (Prefix-RFT).

    No clip binds there. The continuation is `clipped`.
    """
    own = torch.where(inputs.prefix, inputs.log_probs.detach(), inputs.old_log_probs)
    return clipped(replace(inputs, old_log_probs=own))
