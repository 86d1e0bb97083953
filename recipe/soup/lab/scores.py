"""Responses scored under the lab's model, for `selection=verified`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recipe.soup.lab.forward import Sample, distributions, forward, of_responses
from recipe.soup.lab.update import Updater
from recipe.soup.prefixes.requests import SampledPrefix


class LabScores:
    """The interface `Scores` on one model.

    Args:
        model: its weights change between calls.
        temperature: of the rollout.
        eos_token_id: ends a response.
        updater: computes in its own way, and in its own micro-batches; None: plainly, all at once.
    """

    def __init__(self, model: Any, temperature: float, eos_token_id: int, updater: Updater | None) -> None:
        self._model, self._temperature, self._updater = model, temperature, updater
        self.eos_token_id = eos_token_id

    @torch.no_grad()
    def log_probs(self, responses: Sequence[SampledPrefix]) -> list[np.ndarray]:
        samples = [_sample(response) for response in responses]
        if self._updater is None:
            values, _ = forward(self._model, samples, self._temperature, with_entropy=False)
        else:
            values, _ = self._updater.forward_all(samples)
        return [row.numpy() for row in of_responses(values, samples)]

    def distributions(self, responses: Sequence[SampledPrefix]) -> list[np.ndarray]:
        return self.of_samples([_sample(response) for response in responses])

    @torch.no_grad()
    def of_samples(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """`distributions` of samples."""
        return [rows.numpy() for rows in distributions(self._model, samples, self._temperature)]


def _sample(response: SampledPrefix) -> Sample:
    assert response.prompt_ids is not None
    return Sample(response.prompt_ids, response.prefix.token_ids.tolist(), [], [], 0.0, 0)
