"""verl's trainer and ours on one recorded batch: verl's real training worker, an in-memory TransferQueue, no Ray.

The batch was recorded on the real path (step 5 of a countdown run, lag 2): 64 samples, half of them mixed.
"""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from torchdata.stateful_dataloader import StatefulDataLoader
from training_worker import (
    COUNTDOWN,
    ENTERING,
    STEP,
    StillWorkers,
    Store,
    WorkerGroup,
    make_trainer,
    recorded,
    update,
    visits,
    with_tools,
)
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.utils import create_rl_sampler
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.dataset.rl_dataset import collate_fn

from recipe.soup.algorithm.batch import NOBODY
from recipe.soup.names import REQUESTS_KEY, SAMPLED_KEY
from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.prefixes.finished import fingerprint
from recipe.soup.prefixes.plan import PromptPlan
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.requests import PromptRequests, PromptWithTools, SampledPrefix
from recipe.soup.prefixes.source import BANK_FILE
from recipe.soup.verl_adapter.step_state import StepState
from recipe.soup.verl_adapter.trainer import SoupTrainer
from recipe.soup.verl_adapter.transfer_queue import without_padding

pytestmark = pytest.mark.usefixtures("process_group")

CHUNK = Chunk(None, first_ordinal=32, messages=[""] * 16, plans=[PromptPlan([], 2)] * 16)


@pytest.mark.parametrize("tools", [False, True])
def test_off_is_off(composed: Any, store: Store, tools: bool) -> None:
    """Without mixed samples, ours is verl's GRPO bit for bit: what enters the update, and the parameters after it."""
    plain = composed(*COUNTDOWN, "algorithm.adv_estimator=grpo")
    theirs, _ = update(PPOTrainerSync, plain, store, loss=False, mixed=False, tools=tools)
    before = WorkerGroup(plain, store).parameters()
    for overrides in (["algorithm=grpo"], ["algorithm=soup", "algorithm.soup.mixed_share=0"]):
        config = composed(*COUNTDOWN, *overrides)
        ours, metrics = update(SoupTrainer, config, store, loss=True, mixed=False, tools=tools)
        for name in ENTERING:
            assert torch.equal(theirs.entered[0][name], ours.entered[0][name]), name
        for name, tensor in theirs.parameters().items():
            assert torch.equal(tensor, ours.parameters()[name]), name
            assert not torch.equal(tensor, before[name]), name
        assert metrics["soup/train/prefix/tokens"] == 0
        assert metrics["soup/train/tool_tokens"] == 128 * tools


@pytest.mark.parametrize("tools", [False, True])
def test_mixed_samples_enter_with_the_behaviour_log_probs(composed: Any, store: Store, tools: bool) -> None:
    config = composed(*COUNTDOWN, "algorithm=soup")
    group, metrics = update(SoupTrainer, config, store, loss=True, mixed=True, tools=tools)
    behavior = torch.cat([row["rollout_log_probs"] for row in store.rows.values()])
    versions = torch.cat([row["policy_versions"] for row in store.rows.values()])
    entered, prefix = group.entered[0]["old_log_probs"], (versions < STEP - 1) & (versions != NOBODY)
    assert prefix.any()
    assert torch.equal(entered[prefix], behavior[prefix])
    # What tools wrote keeps what verl computed for it, and counts nowhere.
    assert bool((entered[versions == NOBODY] != 0).all())
    assert not group.entered[0]["advantages"][versions == NOBODY].any()
    assert metrics["soup/loss/continuation/tokens"] == pytest.approx(
        int((versions == STEP - 1).sum()) / 2  # two mini-batches
    )
    # The recorded continuation came from version 4, this worker holds version 0: it must be recomputed, not copied.
    assert not torch.equal(entered[~prefix], behavior[~prefix])
    assert metrics["soup/train/prefix/tokens"] == prefix.sum()
    assert metrics["soup/loss/prefix/tokens"] == pytest.approx(prefix.sum().item() / 2)  # two mini-batches
    assert metrics["soup/train/prefix/ratio_at_start/min"] < 0.95
    assert metrics["soup/train/prefix/ratio_at_start/max"] > 1.05
    assert not any(key.startswith("actor/soup") for key in metrics)


def test_bypass_mode_takes_the_engines_log_probs_on_every_token(composed: Any, store: Store) -> None:
    """verl's setting that saves the trainer's forward pass: behaviour log-probs everywhere, without a splice."""
    overrides = ["algorithm=soup", "algorithm.rollout_correction.bypass_mode=true"]
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, *overrides))  # no worker to ask
    metrics: dict = {}
    trainer._compute_old_log_prob(recorded(store), metrics)
    assert all(torch.equal(row["old_log_probs"], row["rollout_log_probs"]) for row in store.rows.values())
    assert metrics["soup/train/prefix/tokens"] > 0
    assert not any("at_start" in key or "entropy" in key for key in metrics)  # nothing to compare with


def test_padding_rows_are_left_alone(composed: Any, store: Store) -> None:
    """verl's padding rows repeat the first sample's versions and extra fields, with a response of length 1."""
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup"), None)
    trainer.actor_rollout_wg = StillWorkers(store)
    batch = recorded(store, slice(0, 7))
    first = store.rows[batch.keys[0]]
    assert first["policy_versions"][0] < STEP - 1  # a mixed sample lends its fields to the padding
    prefix = Prefix(np.arange(2, dtype=np.int32), np.zeros(2, np.float32), ((4, 2),))
    first["extra_fields"][SAMPLED_KEY] = [SampledPrefix(40, 0, prefix, 3, False).pack()]
    trainer.source.queue.append(CHUNK)
    batch = upsample_batch_to_divisible_size(batch, 4, eos_token_id=1)
    assert len(batch) == 8
    padding = store.rows[batch.keys[-1]]
    assert len(padding["policy_versions"]) != len(padding["responses"])

    batch.extra_info = {}
    metrics: dict = {}
    tags = batch.tags
    out = trainer._compute_old_log_prob(
        KVBatchMeta(partition_id="train", keys=batch.keys, tags=tags, extra_info={}), metrics
    )
    assert out is not None
    for key in batch.keys:
        row = store.rows[key]
        assert len(row["old_log_probs"]) == len(row["prefix_mask"]) == len(row["responses"])
    for key in batch.keys[:-1]:
        row = store.rows[key]
        historical = row["policy_versions"] < STEP - 1
        assert torch.equal(row["old_log_probs"][historical], row["rollout_log_probs"][historical])
        assert not row["old_log_probs"][~historical].any()
    assert padding["prefix_mask"].tolist() == [0]
    assert metrics["soup/cost/seed_requests"] - metrics["soup/cost/seeds_lost"] == 1  # not once more for the padding
    assert len(trainer.source.bank) == 1
    assert without_padding(batch).keys == batch.keys[:-1]


def test_replay_is_handed_every_sample_with_its_prompt(composed: Any, store: Store) -> None:
    """The recorded samples come back as prefixes, with the log-probs and versions of each token; padding does not."""
    overrides = ["algorithm.soup.source=replay", "algorithm.soup.mixed_share=1", "algorithm.soup.prefix_length.max=12"]
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup", *overrides))
    trainer.actor_rollout_wg = StillWorkers(store)
    batch = recorded(store, slice(0, 15))
    uids = list(dict.fromkeys(store.rows[key]["uid"] for key in batch.keys))
    messages = {uid: [{"role": "user", "content": uid}] for uid in uids}
    visits(store, {uid: (i, messages[uid]) for i, uid in enumerate(uids)})
    batch = upsample_batch_to_divisible_size(batch, 4, eos_token_id=1)
    assert batch.tags[-1]["is_padding"]
    batch = KVBatchMeta(partition_id="train", keys=batch.keys, tags=batch.tags, extra_info={})
    trainer._compute_advantage(trainer._compute_old_log_prob(batch, {}), {})
    assert trainer.collected == StepState(shown=trainer.collected.shown, all_rows=trainer.collected.all_rows)
    kept = {uid: list(trainer.source.bank.take(fingerprint(messages[uid])).values()) for uid in uids}
    assert sum(map(len, kept.values())) == 15
    several = 0
    for uid, prefixes in kept.items():
        rows = [row for key, row in store.rows.items() if row["uid"] == uid and key in batch.keys[:15]]
        for prefix in prefixes:
            n = len(prefix)
            several += len(prefix.version_spans) > 1
            assert any(
                row["responses"][:n].tolist() == prefix.token_ids.tolist()
                and row["policy_versions"][:n].tolist() == prefix.versions
                and row["rollout_log_probs"][:n].tolist() == prefix.log_probs.tolist()
                for row in rows
            )
    assert several > 0


@pytest.mark.parametrize("tools", [False, True])
def test_a_source_is_handed_the_first_turn(
    composed: Any, store: Store, tools: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefixes are cut from it, and lengths that are a fraction of a response are a fraction of it."""
    overrides = ["algorithm.soup.source=replay", "algorithm.soup.prefix_length.unit=fraction"]
    unset = ["algorithm.soup.prefix_length.min=null", "algorithm.soup.prefix_length.max=1"]
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup", *overrides, *unset))
    trainer.actor_rollout_wg = StillWorkers(store)
    batch = recorded(store, slice(0, 8))
    if tools:
        with_tools(store)
    uid = store.rows[batch.keys[0]]["uid"]
    visits(store, {uid: (0, [])})
    handed: list[Any] = []
    trainer.source.keep = handed.extend
    monkeypatch.setattr(type(trainer.source), "wants_evicted", True)
    trainer._compute_old_log_prob(KVBatchMeta(partition_id="train", keys=batch.keys, tags=batch.tags), {})
    trainer._drop_groups([], batch)  # as of a group that is filtered out
    assert [sample.entropy is None for sample in handed] == [False] * 8 + [True] * 8
    for sample, row in zip(handed, [*store.rows.values()] * 2, strict=True):
        turn = int((row["policy_versions"] == NOBODY).long().argmax()) if tools else len(row["responses"])
        assert sample.token_ids.tolist() == row["responses"][:turn].tolist()
        assert sample.versions.tolist() == row["policy_versions"][:turn].tolist()
        assert NOBODY not in sample.versions
        assert len(sample.log_probs) == len(sample.token_ids if sample.entropy is None else sample.entropy) == turn
        assert sample.reward == float(row["rm_scores"].sum())


def test_filtered_groups_leave_their_seeds(composed: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[str] = []
    monkeypatch.setattr(tq, "kv_clear", lambda keys, partition_id: cleared.extend(keys))
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup", "algorithm.filter_groups.enable=true"))
    trainer.source.queue.append(CHUNK)
    batch = recorded(store)
    uid = batch.keys[0].split("_")[0]
    prefix = Prefix(np.arange(2, dtype=np.int32), np.zeros(2, np.float32), ((4, 2),))
    for key in batch.keys[:2]:
        store.rows[key]["extra_fields"][SAMPLED_KEY] = [SampledPrefix(40, 0, prefix, 3, False).pack()]
    store.rows[batch.keys[1]]["extra_fields"][SAMPLED_KEY] = [
        SampledPrefix(31, 0, prefix, 3, False).pack()
    ]  # trained on already
    replay_buffer = trainer.replay_buffer
    replay_buffer.partitions["train"] = dict(zip(batch.keys, batch.tags, strict=True))
    replay_buffer._clear_groups("train", {uid})
    trainer._harvest({})
    assert trainer.source.bank.slots(40) == {0}
    assert trainer.source.bank.slots(31) == frozenset()
    assert uid in cleared
    assert batch.keys[0] in cleared


def test_validation_carries_no_prefixes(composed: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own `_validate`, up to the moment at which the agent loops get their batch."""
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup"))
    trainer.source.bank.put(0, 0, Prefix(np.arange(2, dtype=np.int32), np.zeros(2, np.float32), ((1, 2),)))
    trainer.val_dataloader = [{"raw_prompt": np.array([[{"role": "user", "content": "x"}]], dtype=object)}]
    seen = []

    class Reached(Exception):
        pass

    def generate_sequences(batch: TensorDict) -> None:
        seen.append(batch)
        raise Reached

    trainer.agent_loop_manager = SimpleNamespace(generate_sequences=generate_sequences)
    with pytest.raises(Reached):
        trainer._validate()
    assert REQUESTS_KEY not in seen[0]


def test_the_source_learns_of_weights_and_validations_in_verls_order(
    composed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshots are taken, and colocated prefixes sampled, while the current policy's engine sleeps."""
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup"))
    events: list[Any] = []
    for name in ("generated", "updated", "validated"):
        setattr(trainer.source, name, lambda *args, name=name: events.append((name, *args)))
    trainer.checkpoint_manager = SimpleNamespace(
        sleep_replicas=lambda: events.append("sleeps"), update_weights=lambda version: events.append("wakes")
    )
    trainer.curr_step_profile, trainer.timing_raw = False, {}
    trainer.on_sample_end()
    trainer.on_step_end()
    scores = {"val-core/a/acc/mean@4": 0.25, "val-core/b/reward/mean@4": 0.75, "val-core/a/acc/best@4/mean": 1.0}
    monkeypatch.setattr(PPOTrainerSync, "_validate", lambda self: scores)
    assert trainer._validate() == scores
    assert events == ["sleeps", ("generated", STEP), ("updated", STEP), "wakes", ("validated", STEP, 0.5)]


class TestPrompts:
    """The lookahead in the trainer: order, orders, refills and checkpoints, on a dataloader of 40 prompts."""

    @pytest.fixture
    def trainer(self, composed: Any) -> Any:
        overrides = ["data.train_batch_size=4", "algorithm.soup.lag=2", "algorithm.soup.warm_start=pure"]
        config = composed(*COUNTDOWN, "algorithm=soup", *overrides, "actor_rollout_ref.rollout.n=4")
        return self.with_loader(config, shuffle=False)

    @staticmethod
    def with_loader(config: DictConfig, shuffle: bool) -> Any:
        """A trainer on verl's kind of dataloader."""
        rows = [{"raw_prompt": [{"role": "user", "content": str(i)}], "index": torch.tensor(i)} for i in range(40)]
        sampler = create_rl_sampler(OmegaConf.create({"shuffle": shuffle, "seed": 3}), cast(Any, rows))
        loader = StatefulDataLoader(
            cast(Any, rows), batch_size=4, sampler=sampler, collate_fn=collate_fn, drop_last=True
        )
        return make_trainer(SoupTrainer, config, loader=loader)

    def step(self, trainer: Any, step: int) -> tuple[list[int], list[PromptRequests]]:
        trainer.global_steps = step
        batch = trainer._next_train_batch()
        return batch["index"].tolist(), list(batch[REQUESTS_KEY])

    def test_seeds_ride_on_the_batch_and_come_back_as_prefixes(self, trainer: Any) -> None:
        indexes, orders = self.step(trainer, 1)
        assert indexes == [0, 1, 2, 3]
        seeds = [seed for order in orders for per_sample in order.requests.values() for seed in per_sample]
        assert max(len(per_sample) for order in orders for per_sample in order.requests.values()) == 1  # spread out
        # lag 2: step 1 seeds what step 3 trains on
        assert sorted(seed.ordinal for seed in seeds) == [8, 9, 10, 11]
        assert [seed.messages[0]["content"] for seed in sorted(seeds, key=lambda seed: seed.ordinal)] == [
            "8", "9", "10", "11",
        ]  # fmt: skip
        assert all(len(seed.lengths) == 2 for seed in seeds)  # half of 4 samples
        prefix = Prefix(np.arange(3, dtype=np.int32), np.zeros(3, np.float32), ((0, 3),))
        for seed in seeds:
            for slot in seed.lengths:
                trainer.source.bank.put(seed.ordinal, slot, prefix)
        assert all(not order.prefixes for order in self.step(trainer, 2)[1])
        indexes, orders = self.step(trainer, 3)
        assert indexes == [8, 9, 10, 11]
        assert all(set(order.prefixes) == {0, 1} for order in orders)

    def test_the_order_is_that_of_plain_verl_across_the_epochs_end(self, trainer: Any) -> None:
        order = [index for step in range(1, 15) for index in self.step(trainer, step)[0]]
        assert order == [i % 40 for i in range(56)]

    @pytest.mark.parametrize("stop", [3, 8, 9, 10, 12])
    def test_a_checkpoint_goes_on_at_the_first_untrained_prompt(self, trainer: Any, tmp_path: Path, stop: int) -> None:
        """Ten steps are an epoch: 8 and 9 stop where the lookahead has crossed its end, 10 at the end itself."""
        config = trainer.config
        with open_dict(config):
            config.trainer.save_freq = 1
        uninterrupted = self.with_loader(config, shuffle=True)
        expected = [self.step(uninterrupted, step)[0] for step in range(1, 15)]
        assert sorted(index for indexes in expected[:10] for index in indexes) == list(range(40))
        assert expected[10:] != expected[:4]  # the second epoch is shuffled anew

        stopped = self.with_loader(config, shuffle=True)
        for step in range(1, stop + 1):
            self.step(stopped, step)
        state = copy.deepcopy(stopped.train_dataloader.state_dict())
        stopped.source.save(tmp_path)

        resumed = self.with_loader(config, shuffle=True)
        resumed.train_dataloader.load_state_dict(state)
        resumed.source.load(tmp_path)
        assert [self.step(resumed, step)[0] for step in range(stop + 1, 15)] == expected[stop:]

    @pytest.mark.parametrize("mode", ["auto", "resume_path"])
    def test_a_checkpoint_of_another_lag_is_adapted_and_told(
        self,
        trainer: Any,
        tmp_path: Path,
        mode: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = tmp_path / "global_step_4"
        folder.mkdir()
        prefix = Prefix(np.arange(3, dtype=np.int32), np.zeros(3, np.float32), ((1, 3),))
        trainer.source.facts = replace(trainer.source.facts, origin={"algorithm.soup.lag": 9})
        for step in range(1, 5):
            self.step(trainer, step)
        trainer.source.bank.put(16, 0, prefix)  # of step 5, whose lag is 2
        trainer.source.bank.put(16, 1, replace(prefix, version_spans=((2, 3),)))
        trainer.source.save(folder)

        def load(self: Any) -> None:
            self.global_steps = 4

        monkeypatch.setattr(PPOTrainerSync, "_load_checkpoint", load)
        places = dict.fromkeys(("default_local_dir", "rollout_data_dir", "validation_data_dir"), str(tmp_path))
        trainer.config.trainer.update(resume_mode=mode, resume_from_path=str(folder), **places)
        trainer.source.facts = replace(trainer.source.facts, origin={"algorithm.soup.lag": 2})
        trainer._load_checkpoint()
        assert trainer.source.bank.slots(16) == {1}
        said = "algorithm.soup.lag=2 (was 9); of its 2 prefixes 1 are used, and dropped are 1 older than the lag."
        assert said in capsys.readouterr().out

    def test_a_refill_takes_the_next_prompts_and_orders_nothing(self, trainer: Any) -> None:
        self.step(trainer, 1)
        refill = trainer._next_train_batch(4)
        assert refill["index"].tolist() == [4, 5, 6, 7]
        assert all(not order.requests for order in refill[REQUESTS_KEY])

    @staticmethod
    def init_dataloader(config: DictConfig, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> Any:
        """A trainer whose dataloaders ours has taken over from verl's."""

        def verls(self: Any) -> None:
            self.train_dataloader, self.val_dataloader = (
                StatefulDataLoader(cast(Any, rows), batch_size=4, collate_fn=collate_fn) for _ in range(2)
            )
            self.steps_per_epoch = len(rows) // 4

        monkeypatch.setattr(PPOTrainerSync, "_init_dataloader", verls)
        trainer = SoupTrainer(config)
        trainer.global_steps, trainer.train_dataloader_it = 1, None
        trainer._init_dataloader()
        return trainer

    @pytest.mark.parametrize(("example", "verls", "ours"), [
        ("countdown", "single_turn_agent", "soup_agent"), ("countdown_tool", "tool_agent", "soup_tool_agent"),
    ])  # fmt: skip
    def test_rows_that_ask_for_verls_loop_run_on_ours(
        self, composed: Any, monkeypatch: pytest.MonkeyPatch, example: str, verls: str, ours: str
    ) -> None:
        """The worker takes the default where no row asks; so in training and in validation."""
        config = composed("algorithm=soup", "hardware=cpu", f"example={example}", "data.train_batch_size=4")
        assert config.actor_rollout_ref.rollout.agent.default_agent_loop == ours
        row = {"raw_prompt": [{"role": "user", "content": "x"}]}
        rows = [{**row, "agent_name": name, "index": torch.tensor(i)} for i, name in enumerate([verls, ours] * 6)]
        trainer = self.init_dataloader(config, monkeypatch, rows)
        batches = [trainer._next_train_batch(), *trainer.val_dataloader]
        assert all("agent_name" not in batch and len(batch["index"]) == 4 for batch in batches)
        for other in ({"soup_agent", "soup_tool_agent"} - {ours}) | {"react_agent"}:
            rows[1]["agent_name"] = other
            trainer = self.init_dataloader(config, monkeypatch, rows)
            with pytest.raises(ValueError, match=f"agent_name={other} in the data: this run has {ours}"):
                trainer._next_train_batch()

    def test_requests_carry_the_tools_that_their_prompt_may_call(
        self, composed: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        overrides = ["data.train_batch_size=4", "algorithm.soup.lag=1", "algorithm.soup.warm_start=pure"]
        messages = [{"role": "user", "content": "x"}]
        chosen: list[Any] = [["calculator", "clock"], ["clock"], [], None] * 4
        rows = [{"raw_prompt": messages, "extra_info": {"tool_selection": tools}} for tools in chosen]
        for example in ("countdown_tool", "countdown"):
            config = composed("algorithm=soup", "hardware=cpu", f"example={example}", *overrides)
            trainer = self.init_dataloader(config, monkeypatch, rows)
            batch = trainer._next_train_batch()
            orders = [order for row in batch[REQUESTS_KEY] for orders in row.requests.values() for order in orders]
            tools = {order.ordinal - 4: order.tools for order in orders}
            own = {0: ("calculator", "clock"), 1: ("clock",)} if example == "countdown_tool" else {}
            assert tools == {ordinal: own.get(ordinal, ()) for ordinal in range(4)}
            assert all(order.messages == messages for order in orders)
        # They are another prompt with other tools: a source that remembers prompts must not mix them up.
        prompts = [messages, PromptWithTools(messages, ("clock",)), PromptWithTools(messages, ("calculator",))]
        assert len(set(map(fingerprint, prompts))) == 3

    def test_only_numbers_travel_besides_the_messages(self, trainer: Any) -> None:
        _, orders = self.step(trainer, 1)
        for order in orders:
            for sample in range(4):
                order.take(sample)
        assert all(order == PromptRequests() for order in orders)


def test_registered_advantage_is_grpos(composed: Any) -> None:
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn

    estimator: Any = get_adv_estimator_fn("soup")
    rewards = torch.rand(6, 3)
    mask, groups = torch.ones(6, 3), np.array(["a", "a", "b", "b", "b", "c"], dtype=object)
    for norm in (True, False):
        config = composed("algorithm=soup", f"algorithm.norm_adv_by_std_in_grpo={norm}").algorithm
        ours = estimator(token_level_rewards=rewards, response_mask=mask, index=groups, config=config)
        theirs = compute_grpo_outcome_advantage(rewards.clone(), mask, groups, norm_adv_by_std_in_grpo=norm)
        assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[0], torch.zeros(6, 3))


def test_constant_rewards_give_no_gradient(composed: Any) -> None:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    config = composed("algorithm=soup").algorithm
    groups = np.array(["a", "a"], dtype=object)
    estimator: Any = get_adv_estimator_fn("soup")
    advantages, _ = estimator(
        token_level_rewards=torch.ones(2, 3), response_mask=torch.ones(2, 3), index=groups, config=config
    )
    assert not advantages.any()


def test_a_checkpoint_has_the_prefixes_of_groups_that_were_dropped_after_the_update(
    composed: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PPOTrainerSync, "_save_checkpoint", lambda self: None)
    config = composed(*COUNTDOWN, "algorithm=soup", f"trainer.default_local_dir={tmp_path}")
    trainer = make_trainer(SoupTrainer, config)
    trainer.source.queue.append(CHUNK)
    prefix = Prefix(np.arange(2, dtype=np.int32), np.zeros(2, np.float32), ((4, 2),))
    trainer.collected.prefixes = [SampledPrefix(40, 0, prefix, 3, False)]
    trainer._save_checkpoint()
    bank, _, _ = PrefixBank.load(tmp_path / f"global_step_{STEP}" / BANK_FILE)
    assert [(ordinal, slot) for ordinal, slot, _ in bank.items()] == [(40, 0)]
    assert not trainer.collected.prefixes


def test_a_newer_version_than_the_steps_own_ends_the_run(composed: Any, store: Store) -> None:
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup"), StillWorkers(store))
    batch = recorded(store)
    store.rows[batch.keys[3]]["policy_versions"][-1] = STEP
    with pytest.raises(RuntimeError, match=f"Version {STEP} sampled tokens of a step that has {STEP - 1}"):
        trainer._compute_old_log_prob(batch, {})
