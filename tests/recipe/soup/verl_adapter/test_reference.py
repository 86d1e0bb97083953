"""KL's reference policy: verl's engine that only reads its weights, on a CPU."""

import copy
from typing import Any

import pytest
import torch
from training_worker import COUNTDOWN, Store, WorkerGroup, make_trainer, recorded
from verl.workers.engine_workers import ActorRolloutRefWorker

from recipe.soup.verl_adapter.trainer import SoupTrainer

pytestmark = pytest.mark.usefixtures("process_group")


def test_a_reference_policy_of_the_same_weights_gives_the_same_log_probs(composed: Any, store: Store) -> None:
    config = composed(*COUNTDOWN, "algorithm=soup")
    group = WorkerGroup(config, store)
    reference: Any = ActorRolloutRefWorker(config=copy.deepcopy(config).actor_rollout_ref, role="ref")
    reference.init_model()  # verl would pin its weights in host memory, which takes an accelerator
    batch = recorded(store)
    make_trainer(SoupTrainer, config, group)._compute_old_log_prob(batch, {})
    read = reference.compute_ref_log_prob(group._data(batch))["log_probs"]
    expected = group.worker.compute_log_prob(group._data(batch))["log_probs"]
    torch.testing.assert_close(read.values(), expected.values(), rtol=0, atol=1e-6)
