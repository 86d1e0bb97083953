"""Imitation: the negative log-likelihood on the prefix."""

import torch

from recipe.soup.algorithm.losses.clipped import clipped
from recipe.soup.algorithm.losses.inputs import LossInputs, LossOutputs


def nll(inputs: LossInputs) -> LossOutputs:
    """-c log pi_theta on the prefix, whatever the reward and without a clip: SFT's loss. The continuation is `clipped`.

    UFT has it with c = 0.001 on its hints, HPT in the place of the policy's own samples.
    """
    outputs, prefix, c = clipped(inputs), inputs.prefix, inputs.nll_coefficient
    return LossOutputs(
        losses=torch.where(prefix, -c * inputs.log_probs, outputs.losses),
        mass=outputs.mass.masked_fill(prefix, c),
        clipped_low=outputs.clipped_low & ~prefix,
        clipped_high=outputs.clipped_high & ~prefix,
        clipped_dual=outputs.clipped_dual & ~prefix,
    )
