"""Ratios that are shaped rather than clipped on the prefix."""

from dataclasses import replace

import torch

from recipe.soup.algorithm.losses.clipped import clipped, ratios
from recipe.soup.algorithm.losses.inputs import LossInputs, LossOutputs


def shaped(inputs: LossInputs) -> LossOutputs:
    """-A r / (r + gamma) on the prefix, without a clip: the gradient fades as r grows. The continuation is `clipped`.

    LUFFY's shape, on the true ratio.
    """
    outputs = clipped(inputs)
    ratio, prefix = ratios(inputs), inputs.prefix
    shape = ratio / (ratio + inputs.gamma)
    slope = inputs.gamma * ratio / (ratio + inputs.gamma) ** 2
    return LossOutputs(
        losses=torch.where(prefix, -inputs.advantages * shape, outputs.losses),
        mass=torch.where(prefix, (inputs.advantages * slope).detach().abs(), outputs.mass),
        clipped_low=outputs.clipped_low & ~prefix,
        clipped_high=outputs.clipped_high & ~prefix,
        clipped_dual=outputs.clipped_dual & ~prefix,
    )


def luffy(inputs: LossInputs) -> LossOutputs:
    """`shaped` with the prefix's behaviour probability taken as one, as LUFFY does for a teacher it knows nothing of.

    Then r is pi_theta itself, and improbable tokens get the larger gradient.
    """
    return shaped(replace(inputs, old_log_probs=inputs.old_log_probs.masked_fill(inputs.prefix, 0.0)))
