"""Behaviour log-probs by the trainer (`behavior_log_probs=trainer`) where sampler and trainer round differently."""

from collections.abc import Sequence
from dataclasses import replace

from recipe.soup.lab.forward import Sample, of_responses
from recipe.soup.lab.update import Updater
from recipe.soup.prefixes.requests import SampledPrefix


def recompute(seeds: Sequence[SampledPrefix], updater: Updater) -> list[SampledPrefix]:
    """The same prefixes with the log-probs of the updater's model, which must still have the weights that sampled."""
    filled = [seed for seed in seeds if len(seed.prefix)]
    if not filled:
        return list(seeds)
    samples = []
    for seed in filled:
        assert seed.prompt_ids is not None
        samples.append(Sample(seed.prompt_ids, seed.prefix.token_ids.tolist(), [], [], 0.0, 0))
    log_probs = of_responses(updater.forward_all(samples)[0], samples)
    prefixes = {
        id(seed): replace(seed.prefix, log_probs=values.numpy().copy())
        for seed, values in zip(filled, log_probs, strict=True)
    }
    return [replace(seed, prefix=prefixes.get(id(seed), seed.prefix)) for seed in seeds]
