"""Training samples in verl's trackers (TensorBoard, wandb, mlflow, swanlab), their historical prefix in brackets, and
in others what tools wrote or a demonstration says.

They stand behind verl's validation samples, which are never mixed; as many of them: `trainer.log_val_generations`.
"""

from typing import Any

import torch
from transfer_queue import KVBatchMeta

from recipe.soup.algorithm.batch import NOBODY, TrainRows
from recipe.soup.records.marks import marked
from recipe.soup.verl_adapter.transfer_queue import fetch

NOTHING = ["", "", 0.0]

Shown = list[Any]
"""Input, output and score, as verl's loggers take them."""


def mixed_samples(batch: KVBatchMeta, rows: TrainRows, tokenizer: Any, count: int) -> list[Shown]:
    """Up to `count` mixed samples of a step, from all over the batch."""
    real = torch.tensor([not tag.get("is_padding", False) for tag in batch.tags])
    mixed = torch.nonzero(rows.is_prefix.any(dim=1) & real)[:, 0].tolist()
    chosen = mixed[:: max(len(mixed) // count, 1)][:count]
    if not chosen:
        return []
    data = fetch(
        KVBatchMeta(
            partition_id=batch.partition_id, keys=[batch.keys[i] for i in chosen], tags=[batch.tags[i] for i in chosen]
        ),
        ["prompts", "responses"],
    )
    shown = []
    for i, prompt, response in zip(chosen, data["prompts"].unbind(), data["responses"].unbind(), strict=True):
        sampled = rows.policy_versions[i] != NOBODY
        versions = sorted(set(rows.policy_versions[i][rows.response_mask[i] & sampled].tolist()))
        head = f"(training, versions {', '.join(map(str, versions))}) " if versions else "(training, a demonstration) "
        text = marked(tokenizer, response.tolist(), rows.is_prefix[i].tolist(), sampled.tolist())
        shown.append([head + tokenizer.decode(prompt.tolist(), skip_special_tokens=True), text, float(rows.rewards[i])])
    return shown


class MarkedGenerations:
    """Stands before verl's logger of validation samples, and puts training samples behind them."""

    def __init__(self, logger: Any, training: list[Shown]) -> None:
        self._logger = logger._logger if isinstance(logger, MarkedGenerations) else logger
        self._training = training

    def log(self, loggers: Any, samples: list[Any], step: int) -> None:
        """As verl's."""
        # Always as many: wandb's table has a column for each.
        training = [*self._training, *[NOTHING] * len(samples)][: len(samples)]
        self._logger.log(loggers, [*samples, *training], step)
