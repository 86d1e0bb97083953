"""A step of two updates through verl's real training worker: both have old log-probs of the step's first weights."""

from typing import Any

import pytest
import torch
from training_worker import COUNTDOWN, STEP, Store, WorkerGroup, make_trainer, recorded
from transfer_queue import KVBatchMeta
from verl.experimental.separation.engine_workers import DetachActorWorker

from recipe.soup.verl_adapter.trainer import SoupSeparateAsyncTrainer
from verl_ext.detached_worker import KeepingActorWorker

pytestmark = pytest.mark.usefixtures("process_group")

APART = (
    "algorithm=soup",
    "trainer.v1.trainer_mode=soup_separate_async",
    "trainer.v1.separate_async.parameter_sync_step=2",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.rollout.nnodes=1",
)


class Keeping(WorkerGroup):
    """Which puts weights by as well."""

    def save_model_to_cpu(self, n: int) -> None:
        self.worker.save_model_to_cpu(n)

    def restore_model_from_cpu(self, n: int) -> None:
        self.worker.restore_model_from_cpu(n)

    def clear_cpu_model(self, n: int) -> None:
        self.worker.clear_cpu_model(n)


@pytest.mark.parametrize(("cls", "mended"), [(KeepingActorWorker, True), (DetachActorWorker, False)])
def test_the_second_update_has_the_old_log_probs_of_the_first_weights(
    composed: Any, store: Store, cls: Any, mended: bool
) -> None:
    """With verl's own worker they move with the first update, so that every ratio of the second begins at one."""
    config = composed(*COUNTDOWN, *APART)
    group = Keeping(config, store, cls)
    trainer = make_trainer(SoupSeparateAsyncTrainer, config, group)
    trainer._install_loss()
    batch = recorded(store)
    current = torch.cat([store.rows[key]["policy_versions"] for key in batch.keys]) == STEP - 1

    def again() -> KVBatchMeta:
        return KVBatchMeta(partition_id="train", keys=batch.keys, tags=batch.tags, extra_info={})

    def old_log_probs(update: int) -> torch.Tensor:
        trainer.local_trigger_step = update
        trainer._compute_old_log_prob(again(), {})
        return torch.cat([store.rows[key]["old_log_probs"] for key in batch.keys])[current]

    first = old_log_probs(0)
    trainer._compute_advantage(again(), {})
    trainer._update_actor(again(), {})
    trained = group.parameters()
    second = old_log_probs(1)
    moved = float((first - second).abs().max())
    assert moved == 0 if mended else moved > 1e-3  # nats; the bound of `verify` is 5e-5
    assert all(torch.equal(tensor, group.parameters()[name]) for name, tensor in trained.items())
