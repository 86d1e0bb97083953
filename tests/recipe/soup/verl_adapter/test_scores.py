"""Verified replay through verl's real worker: what a step leaves, and what is verified before the next one."""

from typing import Any

import pytest
import torch
import transfer_queue as tq
from training_worker import COUNTDOWN, STEP, Store, WorkerGroup, make_trainer, recorded, visits

from recipe.soup.prefixes.plan import PromptPlan
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.verl_adapter.trainer import SoupTrainer

pytestmark = pytest.mark.usefixtures("process_group")


def test_the_next_step_begins_with_what_the_trainer_accepts(
    composed: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clear(keys: list[str], partition_id: str) -> None:
        for key in keys:
            del store.rows[key]

    monkeypatch.setattr(tq, "kv_clear", clear)
    verified = ("source=replay", "selection=verified", "mixed_share=1", "behavior_log_probs=trainer")
    config = composed(*COUNTDOWN, "algorithm=soup", *(f"algorithm.soup.{key}" for key in verified))
    trainer = make_trainer(SoupTrainer, config, WorkerGroup(config, store))
    trainer.actor_rollout_wg._query_dispatch_info = lambda name: [0]
    batch = recorded(store)
    for row in store.rows.values():
        row["policy_versions"] = torch.full_like(row["policy_versions"], STEP - 1)
    uids = list(dict.fromkeys(str(store.rows[key]["uid"]) for key in batch.keys))
    messages = [f"prompt {uid}" for uid in uids]
    visits(store, {uid: (i, messages[i]) for i, uid in enumerate(uids)})
    trainer._compute_old_log_prob(batch, {})
    # The same prompts come next. The weights have not changed, so all is accepted.
    size = trainer.source.facts.prompts_per_step
    trainer.source.queue.append(Chunk(None, 1000, (messages * size)[:size], [PromptPlan([], 0)] * size))
    trainer.source.updated(STEP)
    assert set(store.rows) == set(batch.keys)  # nothing that was scored is left behind
    _, prefixes = trainer.source.take(STEP + 1)
    for uid, slots in zip(uids, prefixes, strict=False):
        rows = [store.rows[key] for key in batch.keys if str(store.rows[key]["uid"]) == uid]
        assert len(slots) == len(rows)
        responses = {tuple(row["responses"].tolist()): row["old_log_probs"] for row in rows}
        for prefix in slots.values():
            assert prefix.complete
            assert set(prefix.versions) == {STEP}
            known = responses[tuple(prefix.token_ids.tolist())]
            assert prefix.log_probs == pytest.approx(known.float().numpy(), abs=1e-5)
    told = trainer.source.metrics()
    assert told["soup/verified/whole"] == told["soup/verified/responses"] == len(batch.keys)
    assert told["soup/verified/seconds"] > 0
