"""Groups that verl filters out: their tokens are counted, and steering learns from them."""

from typing import Any

import numpy as np
import pytest
from training_worker import COUNTDOWN, STEP, Store, WorkerGroup, make_trainer, recorded, visits
from transfer_queue import KVBatchMeta

from recipe.soup.prefixes.finished import fingerprint
from recipe.soup.verl_adapter.trainer import SoupTrainer

pytestmark = pytest.mark.usefixtures("process_group")
STEERED = ("algorithm.soup.source=replay", "algorithm.soup.selection=steered")


@pytest.mark.parametrize("overrides", [STEERED, ("algorithm.soup.lag=2",), ("algorithm.soup.mixed_share=0",)])
def test_an_evicted_group(overrides: tuple[str, ...], composed: Any, store: Store) -> None:
    seven_groups = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8"
    config = composed(*COUNTDOWN, "algorithm=soup", seven_groups, *overrides)
    trainer = make_trainer(SoupTrainer, config, WorkerGroup(config, store))
    batch = recorded(store)
    uids = list(dict.fromkeys(str(store.rows[key]["uid"]) for key in batch.keys))
    evicted = [key for key in batch.keys if str(store.rows[key]["uid"]) == uids[0]]
    others = [key for key in batch.keys if key not in evicted]
    messages = [{"role": "user", "content": "3 5 7=22:"}]
    visits(store, {uid: (i, [{"role": "user", "content": uid}]) for i, uid in enumerate(uids)})
    visits(store, {uids[0]: (11, messages)})
    rows = [dict(store.rows[key]) for key in evicted]

    def part(keys: list[str]) -> KVBatchMeta:
        return KVBatchMeta(partition_id="train", keys=keys, tags=[store.tags[key] for key in keys], extra_info={})

    trainer._drop_groups({uids[0]}, part(evicted))
    metrics: dict = {}
    trainer._compute_advantage(trainer._compute_old_log_prob(part(others), metrics), metrics)
    current = sum(int((row["policy_versions"] == STEP - 1).sum()) for row in rows)
    assert metrics["soup/cost/evicted_tokens"] == current > 0
    assert trainer.collected.evicted_tokens == 0
    if overrides == STEERED:
        state = trainer.source.steering.prompts[fingerprint(messages)]
        mixed = [row for row in rows if row["policy_versions"].min() < STEP - 1]
        solved = [float(row["rm_scores"].sum()) > 0 for row in mixed]
        assert state.solved == 0.25 + 0.5 * np.mean(solved)
        kept = [stored for of_outcome in state.stored.values() for stored in of_outcome]
        assert 0 < len(kept) <= 8
        whole = {tuple(row["responses"].tolist()): row for row in rows}
        for stored in kept:
            row = whole[tuple(stored.response.token_ids.tolist())]
            assert stored.response.versions == row["policy_versions"].tolist()
            assert stored.response.log_probs.tolist() == row["rollout_log_probs"].tolist()
            assert (stored.visit, stored.cut) == (11, -1)  # no trainer has computed an entropy
        trained = [s for p, s in trainer.source.steering.prompts.items() if p != fingerprint(messages)]
        assert len(trained) == len(uids) - 1
        assert all(stored.cut >= 0 for s in trained for kept in s.stored.values() for stored in kept)
