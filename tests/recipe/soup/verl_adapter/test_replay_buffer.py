"""Listening to verl's replay buffers, on a dictionary in TransferQueue's place."""

import inspect
from typing import Any

import pytest
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from recipe.soup.verl_adapter.replay_buffer import listen

GROUP = {"uid": {"is_prompt": True, "status": "failure", "global_steps": 1}, "uid_0_0": {}, "uid_1_0": {}}
NEXT = {"next": {"is_prompt": True, "status": "finished", "global_steps": 1}, "next_0_0": {}}


class Heard:
    """A replay buffer of verl's that is listened to, and what was told."""

    def __init__(self, cls: Any, monkeypatch: pytest.MonkeyPatch, **listed: dict[str, dict]) -> None:
        self.events: list[tuple[str, list[str]]] = []
        self.listed = listed
        monkeypatch.setattr(tq, "kv_list", lambda: {partition: dict(tags) for partition, tags in listed.items()})
        monkeypatch.setattr(tq, "kv_clear", self._clear)
        common: Any = {"trainer_mode": "", "trainer_config": {}, "max_off_policy_threshold": None, "sampler_kwargs": {}}
        refill = lambda count: listed["train"].update(NEXT)  # noqa: E731
        self.buffer = cls(**common, max_off_policy_strategy="drop", poll_interval=0.0, refill_fn=refill)
        listen(self.buffer, self._dropped, lambda batch: self.events.append(("validates", batch.keys)))

    def _dropped(self, uids: set[str], batch: KVBatchMeta) -> None:
        self.events.append(("dropped", [*uids, *batch.keys]))

    def _clear(self, keys: list[str], partition_id: str) -> None:
        self.events.append(("cleared", sorted(keys)))
        for key in keys:
            self.listed[partition_id].pop(key, None)


def test_dropped_groups_are_told_of_while_their_samples_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's asynchronous buffer gives up a group in which a sample failed, and asks for another."""
    heard = Heard(ReplayBufferAsync, monkeypatch, train=dict(GROUP))
    batch, _ = heard.buffer.sample(global_steps=1, partition_id="train", batch_size=1)
    group = ["uid", "uid_0_0", "uid_1_0"]
    assert heard.events == [("dropped", group), ("cleared", group), ("cleared", ["next"])]
    assert batch.keys == ["next_0_0"]


@pytest.mark.parametrize("cls", [ReplayBuffer, ReplayBufferAsync])
def test_validation_batches_are_told_of_and_training_batches_are_not(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(cls, monkeypatch, val=dict(NEXT), train=dict(NEXT))
    for partition in ("train", "val"):
        heard.buffer.sample(global_steps=1, partition_id=partition, batch_size=1)
    assert heard.events == [("cleared", ["next"]), ("cleared", ["next"]), ("validates", ["next_0_0"])]


def test_a_group_without_samples_is_told_of_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(ReplayBuffer, monkeypatch, train={})
    heard.buffer._clear_groups("train", {"uid"})
    assert heard.events == [("dropped", ["uid"]), ("cleared", ["uid"])]


def test_the_methods_of_verl_that_are_wrapped() -> None:
    for cls in (ReplayBuffer, ReplayBufferAsync):
        assert list(inspect.signature(cls._clear_groups).parameters) == ["self", "partition_id", "uids"]
        assert list(inspect.signature(cls.sample).parameters)[1:] == ["global_steps", "partition_id", "batch_size"]
    # By name, so that the wrapper's keyword `partition_id` is met.
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    assert 'partition_id="train"' in inspect.getsource(PPOTrainer._step_once)
    assert 'partition_id="val"' in inspect.getsource(PPOTrainer._validate)
