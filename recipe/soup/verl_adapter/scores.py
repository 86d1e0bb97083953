"""Responses scored by verl's actor workers, for `selection=verified`."""

from collections.abc import Sequence

import numpy as np

from recipe.soup.prefixes.requests import SampledPrefix
from recipe.soup.verl_adapter.recompute import recompute
from recipe.soup.verl_adapter.step_state import Stage


def by_trainer(trainer: Stage, prefixes: Sequence[SampledPrefix]) -> tuple[list[SampledPrefix], list[float]]:
    """`recompute` on a trainer's actor workers."""
    rollout, workers = trainer.config.actor_rollout_ref.rollout, trainer.actor_rollout_wg
    return recompute(
        prefixes,
        workers,
        ranks=max(workers._query_dispatch_info("actor")) + 1,
        micro_batch_size=rollout.log_prob_micro_batch_size_per_gpu,
        temperature=rollout.temperature,
        eos_token_id=trainer.tokenizer.eos_token_id,
    )


class TrainerScores:
    """The interface `Scores` on a trainer.

    Args:
        trainer: between two steps, when its weights are those that the rollout engine is about to get.
    """

    def __init__(self, trainer: Stage) -> None:
        self._trainer = trainer

    @property
    def eos_token_id(self) -> int:
        return self._trainer.tokenizer.eos_token_id

    def log_probs(self, responses: Sequence[SampledPrefix]) -> list[np.ndarray]:
        scored, _ = by_trainer(self._trainer, responses)
        return [response.prefix.log_probs for response in scored]

    def distributions(self, responses: Sequence[SampledPrefix]) -> list[np.ndarray]:
        raise NotImplementedError("verl's workers tell of no other token; refused at start")
