"""Behaviour log-probs by the trainer (`behavior_log_probs=trainer`) where sampler and trainer round differently."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from recipe.soup.lab.forward import Sample, of_responses
from recipe.soup.lab.update import Updater
from recipe.soup.prefixes.requests import SampledPrefix


def recompute(seeds: Sequence[SampledPrefix], updater: Updater) -> tuple[list[SampledPrefix], list[float]]:
    """Replace prefixes' log-probs by those of the updater's model, which must still have the weights that sampled.

    Returns:
        the prefixes; and by how much the sampler was off, |sampler - trainer| of each token, in nats.
    """
    filled = [seed for seed in seeds if len(seed.prefix)]
    if not filled:
        return list(seeds), []
    samples = []
    for seed in filled:
        assert seed.prompt_ids is not None
        samples.append(Sample(seed.prompt_ids, seed.prefix.token_ids.tolist(), [], [], 0.0, 0))
    log_probs = of_responses(updater.forward_all(samples)[0], samples)
    prefixes = {
        id(seed): replace(seed.prefix, log_probs=values.numpy().copy())
        for seed, values in zip(filled, log_probs, strict=True)
    }
    mismatch = np.concatenate([abs(prefixes[id(seed)].log_probs - seed.prefix.log_probs) for seed in filled])
    return [replace(seed, prefix=prefixes.get(id(seed), seed.prefix)) for seed in seeds], mismatch.tolist()
