"""What happened to prefix and continuation in the loss, over all mini-batches.

verl averages what a loss returns over micro-batches, so the loss returns sums, and the trainer divides.
"""

import torch

from recipe.soup.algorithm.losses.clipped import ratios
from recipe.soup.algorithm.losses.inputs import LossInputs, LossOutputs

PREFIX = "soup/loss/"
SEGMENTS = ("prefix", "continuation")
MEANS = ("ratio", "kl_k1", "kl_k3", "clip_fraction/low", "clip_fraction/high", "clip_fraction/dual")


def loss_sums(inputs: LossInputs, outputs: LossOutputs, response_mask: torch.Tensor) -> dict[str, float]:
    """Sums over one micro-batch, by segment.

    Args:
        response_mask: (batch, response_length), tokens that count.

    Returns:
        per segment: tokens; their ratios, squared ratios and divergences; how many each clip holds back; the mass of
        all gradients and of the clipped ones.
    """
    ratio = ratios(inputs).double()
    clipped = outputs.clipped_low | outputs.clipped_high | outputs.clipped_dual
    values = {
        "tokens": torch.ones_like(ratio),
        "ratio": ratio,
        "squared_ratio": ratio**2,
        "kl_k1": -ratio.log(),
        "kl_k3": ratio - 1 - ratio.log(),
        "clip_fraction/low": outputs.clipped_low,
        "clip_fraction/high": outputs.clipped_high,
        "clip_fraction/dual": outputs.clipped_dual,
        "mass": outputs.mass,
        "clipped_mass": outputs.mass * clipped,
    }
    sums: dict[str, float] = {}
    for name, segment in zip(SEGMENTS, (inputs.prefix, ~inputs.prefix), strict=True):
        mask = segment & response_mask.bool()
        sums |= {f"{PREFIX}{name}/{key}": value[mask].double().sum().item() for key, value in values.items()}
    return sums


def means_of_loss_sums(sums: dict[str, float]) -> dict[str, float]:
    """Turn added-up `loss_sums` into means by token and shares; the number of tokens (per mini-batch) stays."""
    means: dict[str, float] = {}
    for name in SEGMENTS:
        own = {key.removeprefix(f"{PREFIX}{name}/"): value for key, value in sums.items()}
        tokens, squares, mass = own["tokens"], own["squared_ratio"], own["mass"]
        figures = {"tokens": tokens, **{key: own[key] / tokens if tokens else 0.0 for key in MEANS}}
        figures["effective_sample_size"] = own["ratio"] ** 2 / (tokens * squares) if squares else 0.0
        figures["gradient_clipped"] = own["clipped_mass"] / mass if mass else 0.0
        means |= {f"{PREFIX}{name}/{key}": value for key, value in figures.items()}
    return means
