"""Prefix log-probs by the trainer, through verl's real worker, against plain transformers."""

from typing import Any

import numpy as np
import pytest
import torch
import transfer_queue as tq
from training_worker import COUNTDOWN, STEP, Store, WorkerGroup, make_trainer, recorded, visits
from transformers import AutoModelForCausalLM

from recipe.soup.names import SAMPLED_KEY
from recipe.soup.prefixes.plan import PromptPlan
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.requests import SampledPrefix
from recipe.soup.verl_adapter.recompute import recompute
from recipe.soup.verl_adapter.trainer import SoupTrainer

pytestmark = pytest.mark.usefixtures("process_group")
EOS = 1
CHUNK = Chunk(None, first_ordinal=32, messages=[""] * 16, plans=[PromptPlan([], 2)] * 16)
DYNAMIC = (
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=256",
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
)


@pytest.fixture(autouse=True)
def cleared(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    def clear(keys: list[str], partition_id: str) -> None:
        for key in keys:
            del store.rows[key]

    monkeypatch.setattr(tq, "kv_clear", clear)


def seeds_of(count: int) -> list[SampledPrefix]:
    rng = np.random.default_rng(0)
    seeds = []
    for ordinal in range(count):
        length = int(rng.integers(0, 9))
        ids = rng.integers(2, 16, size=length).astype(np.int32)
        prefix = Prefix(ids, -rng.random(length).astype(np.float32), ((STEP - 1, length),) if length else ())
        seeds.append(
            SampledPrefix(ordinal, 0, prefix, length + 1, False, prompt_ids=rng.integers(2, 16, size=7).tolist())
        )
    return seeds


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("count", "ranks", "micro"), [(1, 1, 32), (7, 2, 3), (33, 1, 32), (9, 4, None)])
def test_log_probs_are_the_models(
    count: int, ranks: int, micro: int | None, temperature: float, composed: Any, store: Store, countdown_dir: Any
) -> None:
    """Any number of prefixes, whatever the number of ranks and the size of micro-batches."""
    config = composed(*COUNTDOWN, "algorithm=soup", *(() if micro else DYNAMIC))
    group, seeds = WorkerGroup(config, store), seeds_of(count)
    new, mismatch = recompute(seeds, group, ranks, micro, temperature, EOS)
    model = AutoModelForCausalLM.from_pretrained(countdown_dir / "base_model", dtype=torch.float32)
    assert [seed.ordinal for seed in new] == list(range(count))
    for old, seed in zip(seeds, new, strict=True):
        assert old.prompt_ids is not None
        length = len(old.prefix)
        ids = torch.tensor(old.prompt_ids + old.prefix.token_ids.tolist())
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(old.prompt_ids) - 1 : -1] / temperature
        expected = logits.double().log_softmax(-1).gather(-1, ids[len(old.prompt_ids) :, None])[:, 0].numpy()[:length]
        assert seed.prefix.log_probs == pytest.approx(expected, abs=1e-5)
        assert seed.prefix.token_ids.tolist() == old.prefix.token_ids.tolist()
        assert seed.prefix.version_spans == old.prefix.version_spans
        assert seed.prefix.log_probs.dtype == np.float32
    differences = [abs(a.prefix.log_probs - b.prefix.log_probs) for a, b in zip(seeds, new, strict=True)]
    assert mismatch == pytest.approx(np.concatenate(differences).tolist())
    assert store.rows == {}  # nothing is left behind


class RoundingWorkers(WorkerGroup):
    """Answer in bfloat16, as verl's workers do that compute in it."""

    def compute_log_prob(self, batch: Any) -> Any:
        answer = super().compute_log_prob(batch)
        for key in batch.keys:
            for name in ("log_probs", "entropy"):
                if name in self.store.rows[key]:
                    self.store.rows[key][name] = self.store.rows[key][name].bfloat16()
                    self.store.types[str(batch.partition_id), name] = torch.bfloat16
        return answer


def test_a_trainer_that_rounds(composed: Any, store: Store) -> None:
    config, seeds = composed(*COUNTDOWN, "algorithm=soup"), seeds_of(9)
    exact, _ = recompute(seeds, WorkerGroup(config, store), 1, 32, 1.0, EOS)
    rounded, mismatch = recompute(seeds, RoundingWorkers(config, store), 1, 32, 1.0, EOS)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.prefix.log_probs.dtype == np.float32
        assert ours.prefix.log_probs == pytest.approx(theirs.prefix.log_probs, rel=2**-8)
    assert len(mismatch) == sum(len(seed.prefix) for seed in seeds)


@pytest.mark.parametrize("source", ["lookahead", "replay"])
def test_a_step_of_a_trainer_that_rounds(source: str, composed: Any, store: Store) -> None:
    """On GPUs this is the default: bfloat16, hence `behavior_log_probs=trainer`."""
    keys = [f"algorithm.soup.source={source}", "algorithm.soup.behavior_log_probs=trainer"]
    config = composed(*COUNTDOWN, "algorithm=soup", *keys)
    trainer = make_trainer(SoupTrainer, config, RoundingWorkers(config, store))
    trainer.actor_rollout_wg._query_dispatch_info = lambda name: [0]
    batch = recorded(store)
    uids = dict.fromkeys(str(store.rows[key]["uid"]) for key in batch.keys)
    visits(store, {uid: (i, CHUNK.messages[0]) for i, uid in enumerate(uids)})
    trainer.source.queue.append(CHUNK)
    prefix = Prefix(np.array([3, 4], dtype=np.int32), np.zeros(2, np.float32), ((STEP - 1, 2),))
    arriving = SampledPrefix(40, 0, prefix, 3, False, prompt_ids=[5, 6, 7])
    store.rows[batch.keys[0]]["extra_fields"][SAMPLED_KEY] = [arriving.pack()]
    metrics: dict = {}
    batch = trainer._compute_advantage(trainer._compute_old_log_prob(batch, metrics), metrics)
    numbers = [value for key, value in metrics.items() if key.startswith("soup/")]
    assert numbers
    assert np.isfinite(numbers).all()
    assert metrics["soup/train/prefix/drift/max"] > 0
    assert metrics["soup/prefix/engine_mismatch/max"] > 0
    for row in (store.rows[key] for key in batch.keys):
        old, historical = row["old_log_probs"], row["policy_versions"] < STEP - 1
        assert torch.equal(old[historical], row["rollout_log_probs"][historical])  # to the last bit
        assert torch.equal(old[~historical], old[~historical].bfloat16().float())  # what the trainer answered


def test_the_bank_gets_the_trainers_log_probs_before_the_update(composed: Any, store: Store) -> None:
    config = composed(*COUNTDOWN, "algorithm=soup", "algorithm.soup.behavior_log_probs=trainer")
    trainer = make_trainer(SoupTrainer, config, WorkerGroup(config, store))
    trainer.actor_rollout_wg._query_dispatch_info = lambda name: [0]
    trainer.source.queue.append(CHUNK)
    batch = recorded(store)
    prefix = Prefix(np.array([3, 4], dtype=np.int32), np.zeros(2, np.float32), ((STEP - 1, 2),))
    seed = SampledPrefix(40, 0, prefix, 3, False, prompt_ids=[5, 6, 7])
    store.rows[batch.keys[0]]["extra_fields"][SAMPLED_KEY] = [seed.pack()]
    metrics: dict = {}
    trainer._compute_old_log_prob(batch, metrics)
    kept = trainer.source.bank.take(40)[0]
    assert kept.version_spans == ((STEP - 1, 2),)
    assert (kept.log_probs < 0).all()
    assert metrics["soup/prefix/engine_mismatch/max"] == pytest.approx(-kept.log_probs.min())
