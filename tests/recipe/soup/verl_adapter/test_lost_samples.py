"""Samples that never come, through verl's own replay buffers on a dictionary in TransferQueue's place."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transfer_queue as tq
from tensordict import NonTensorData, TensorDict
from training_worker import COUNTDOWN, make_trainer
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.utils import tensordict_utils as tu

from recipe.soup.verl_adapter import lost_samples
from recipe.soup.verl_adapter.lost_samples import NOTHING_LEFT, LostSamples
from recipe.soup.verl_adapter.missing_samples import KEY
from recipe.soup.verl_adapter.trainer import SoupTrainer
from verl_ext.health import ENDED, NOTICE, RunEndedError

PROMPTS, SAMPLES = 8, 8
ERROR = "ValueError: a grader that fails"


class Queue:
    """What TransferQueue lists: prompts and their samples, by key."""

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, Any]] = {}
        self.rewards: dict[str, float] = {}

    def add(self, uid: str, arrived: int = SAMPLES, rewards: Callable[[int], float] = float) -> None:
        """A prompt's group, all of whose samples are done."""
        status = "finished" if arrived == SAMPLES else "failure"
        self.tags[uid] = {"is_prompt": True, "status": status, "global_steps": 1}
        for session in range(arrived):
            self.tags[f"{uid}_{session}_0"] = {"status": "success"}
            self.rewards[f"{uid}_{session}_0"] = rewards(session)

    def clear(self, keys: list[str], partition_id: str) -> None:
        for key in keys:
            self.tags.pop(key, None)

    def get(self, keys: list[str], **_: Any) -> TensorDict:
        return TensorDict({"rm_scores": torch.tensor([[self.rewards[key]] for key in keys])}, batch_size=len(keys))


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(tq, "kv_list", lambda: {"train": dict(queue.tags)})
    monkeypatch.setattr(tq, "kv_clear", queue.clear)
    monkeypatch.setattr(tq, "kv_batch_get", queue.get)
    monkeypatch.setattr(tq, "kv_batch_put", lambda **_: None)
    monkeypatch.setattr(lost_samples, "first_failure", lambda agents: ERROR)
    return queue


def prompts(*uids: str) -> TensorDict:
    batch = TensorDict({"index": torch.arange(len(uids))}, batch_size=len(uids))
    tu.assign_non_tensor_stack(batch, "uid", list(uids))
    return batch


def watched(cls: Any, most: float = 0.05, **kwargs: Any) -> tuple[LostSamples, Any]:
    lost = LostSamples(SAMPLES, PROMPTS * SAMPLES, most)
    common = {"trainer_mode": "sync", "trainer_config": {}, "max_off_policy_threshold": None, "sampler_kwargs": {}}
    buffer = cls(**common, max_off_policy_strategy="drop", poll_interval=0.0, **kwargs)
    lost.watch(buffer)
    return lost, buffer


def counted(metrics: dict[str, float]) -> list[float]:
    return [metrics[f"soup/train/samples/{name}"] for name in ("asked", "arrived", "trained", "lost_share")]


def step(lost: LostSamples, buffer: Any, queue: Queue, number: int, missing: int) -> dict[str, float]:
    """One step of verl's, whose first prompt lacks samples."""
    uids = [f"{number}-{i}" for i in range(PROMPTS)]
    lost.send(prompts(*uids))
    for i, uid in enumerate(uids):
        queue.add(uid, SAMPLES - missing if i == 0 else SAMPLES)
    batch, metrics = buffer.sample(global_steps=number, partition_id="train", batch_size=PROMPTS)
    queue.clear(batch.keys, "train")
    return metrics


def test_losses_are_counted_in_every_step_and_told_once(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    lost, buffer = watched(ReplayBuffer)
    assert counted(step(lost, buffer, queue, 1, missing=0)) == [64, 64, 64, 0]
    assert NOTICE not in capsys.readouterr().out
    assert counted(step(lost, buffer, queue, 2, missing=2)) == [64, 62, 62, 2 / 64]
    told = capsys.readouterr().out
    assert told.startswith(f"{NOTICE}step 2 lost 2 of 64 samples; the first error was {ERROR}.")
    assert counted(step(lost, buffer, queue, 3, missing=3)) == [64, 61, 61, 3 / 64]
    assert NOTICE not in capsys.readouterr().out


@pytest.mark.parametrize(("most", "missing", "ends"), [(0.05, 4, True), (0.0, 1, True), (0.125, 8, False)])
def test_above_the_share_the_run_ends_with_the_first_error(
    queue: Queue, capsys: pytest.CaptureFixture[str], most: float, missing: int, ends: bool
) -> None:
    lost, buffer = watched(ReplayBuffer, most)
    if not ends:
        assert counted(step(lost, buffer, queue, 1, missing))[1] == 64 - missing
        return
    with pytest.raises(RunEndedError) as ended:
        step(lost, buffer, queue, 1, missing)
    text = str(ended.value)
    assert text in capsys.readouterr().out
    assert f"Step 1 lost {missing} of 64 samples, more than {KEY}={most:g} allows" in text
    assert ERROR in text
    assert f"raise {KEY}" in text
    assert text.endswith(ENDED)


def test_where_nothing_is_left_the_reason_stands_before_verls_advice(queue: Queue) -> None:
    lost, buffer = watched(ReplayBuffer)
    uids = [str(i) for i in range(PROMPTS)]
    lost.send(prompts(*uids))
    for uid in uids:
        queue.add(uid, arrived=0)
    with pytest.raises(RunEndedError, match="lost 64 of 64 samples") as ended:
        buffer.sample(global_steps=1, partition_id="train", batch_size=PROMPTS)
    assert NOTHING_LEFT in str(ended.value.__context__)


def test_filtered_refilled_and_surplus_groups_are_not_lost(queue: Queue) -> None:
    """verl asks for twice as many prompts as it filters out, and throws away what is too much."""
    lost: LostSamples

    def refill(count: int) -> None:
        uids = [f"more-{len(queue.tags)}-{i}" for i in range(count)]
        lost.send(prompts(*uids))
        for uid in uids:
            queue.add(uid)

    dapo = {"filter_groups_metric": "reward", "train_batch_size": PROMPTS, "gen_batch_size": 1, "refill_fn": refill}
    lost, buffer = watched(ReplayBuffer, **dapo)
    uids = [str(i) for i in range(PROMPTS)]
    lost.send(prompts(*uids))
    for i, uid in enumerate(uids):
        queue.add(uid, SAMPLES - (i == 7), rewards=(lambda _: 1.0) if i < 4 else float)
    batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=PROMPTS)
    assert metrics["training/filter_groups/evicted_samples"] == 4
    assert metrics["training/filter_groups/discarded_surplus_samples"] == 4
    assert counted(metrics) == [128, 127, len(batch), 1 / 128]
    assert len(batch) in (63, 64)


def test_replaced_groups_count_what_they_lost_and_no_more(queue: Queue) -> None:
    """The asynchronous trainer gives a whole group up when one of its samples failed."""
    lost: LostSamples

    def refill(count: int) -> None:
        lost.send(prompts("instead"))
        queue.add("instead")

    lost, buffer = watched(ReplayBufferAsync, refill_fn=refill)
    metrics = step(lost, buffer, queue, 1, missing=1)
    assert counted(metrics) == [72, 71, 64, 1 / 72]


def test_a_grader_that_always_fails_does_not_refill_for_ever(queue: Queue) -> None:
    lost: LostSamples
    refills = 0

    def refill(count: int) -> None:
        nonlocal refills
        refills += 1
        assert refills < 100
        uids = [f"again-{refills}-{i}" for i in range(count)]
        lost.send(prompts(*uids))
        for uid in uids:
            queue.add(uid, arrived=0)

    lost, buffer = watched(ReplayBufferAsync, refill_fn=refill)
    with pytest.raises(RunEndedError, match="lost 8 of 64 samples"):
        step(lost, buffer, queue, 1, missing=8)


def test_samples_of_prompts_that_ask_for_other_numbers(queue: Queue) -> None:
    """The twin honours verl's column; and a resumed run gets groups that another sent out."""
    lost, buffer = watched(ReplayBuffer, most=1)
    batch = prompts("a", "b")
    tu.assign_non_tensor_stack(batch, "__rollout_n__", [4, 16])
    lost.send(batch)
    for uid in ("a", "b", "c"):
        queue.add(uid, arrived=4)
    _, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=3)
    assert counted(metrics) == [4 + 16 + 8, 12, 12, 16 / 28]


def test_a_grader_that_always_fails_ends_the_run_whatever_the_share(queue: Queue) -> None:
    """Both trainers; the asynchronous one would refill for ever."""

    def refill(count: int) -> None:
        uids = [f"again-{len(queue.tags)}-{i}" for i in range(count)]
        lost.send(prompts(*uids))
        for uid in uids:
            queue.add(uid, arrived=0)

    for cls in (ReplayBuffer, ReplayBufferAsync):
        lost, buffer = watched(cls, most=1, refill_fn=refill)
        uids = [str(i) for i in range(PROMPTS)]
        lost.send(prompts(*uids))
        for uid in uids:
            queue.add(uid, arrived=0)
        with pytest.raises(RunEndedError, match=f"Step 3 lost all of its samples. The first error was {ERROR}"):
            buffer.sample(global_steps=3, partition_id="train", batch_size=PROMPTS)
        queue.tags.clear()


def validate(queue: Queue, monkeypatch: pytest.MonkeyPatch, buffer: Any, arrived: int) -> Any:
    queue.add("val", arrived=arrived)
    monkeypatch.setattr(tq, "kv_list", lambda: {"val": dict(queue.tags)})
    return buffer.sample(global_steps=1, partition_id="val", batch_size=1)


def test_validation_is_no_part_of_a_step_and_told_with_a_metric_of_its_own(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, buffer = watched(ReplayBuffer, most=0)
    batch, metrics = validate(queue, monkeypatch, buffer, arrived=1)
    assert metrics == {}
    counts = lost.validated(1, SAMPLES, len(batch))
    assert [counts[f"soup/val/samples/{name}"] for name in ("asked", "arrived", "lost_share")] == [8, 1, 7 / 8]
    told = capsys.readouterr().out
    assert told.startswith(f"{NOTICE}the validation after step 1 lost 7 of 8 samples; the first error was {ERROR}.")
    lost.validated(2, SAMPLES, 0)
    assert NOTICE not in capsys.readouterr().out


def test_a_validation_without_any_sample_ends_the_run(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl would ask its queue for no keys at all."""
    _, buffer = watched(ReplayBuffer, most=1)
    with pytest.raises(RunEndedError, match=f"The validation after step 1 lost all .* {ERROR}"):
        validate(queue, monkeypatch, buffer, arrived=0)


def test_padding_rows_are_not_trained_samples() -> None:
    lost = LostSamples(SAMPLES, PROMPTS * SAMPLES, 0.05)
    tags = [{}, {"is_padding": True}]
    batch = KVBatchMeta(partition_id="train", keys=["a_0_0", "pad_0_0"], tags=tags)
    buffer: Any = SimpleNamespace(_clear_groups=None, _materialize_batch=None, sample=lambda **_: (batch, {}))
    lost.watch(buffer)
    _, metrics = buffer.sample(global_steps=1, partition_id="train")
    assert metrics["soup/train/samples/trained"] == 1


@pytest.mark.parametrize("algorithm", ["soup", "grpo"])
def test_the_trainer_and_its_twin_count(composed: Any, queue: Queue, algorithm: str) -> None:
    overrides = [f"algorithm={algorithm}", f"{KEY}=0.5", "actor_rollout_ref.rollout.n=8"]
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, *overrides))
    trainer.agent_loop_manager = SimpleNamespace(generate_sequences=lambda batch: None)
    buffer = trainer.replay_buffer
    batch = prompts(*map(str, range(PROMPTS)))
    batch["global_steps"] = NonTensorData(5)
    trainer._submit_batch_to_rollout(batch)
    for i in range(PROMPTS):
        queue.add(str(i), arrived=5)
    _, metrics = buffer.sample(global_steps=5, partition_id="train", batch_size=PROMPTS)
    assert counted(metrics) == [64, 40, 40, 24 / 64]
    trainer._submit_batch_to_rollout(prompts("x"))
    assert trainer.lost._under_way == {"x": 8}


@pytest.mark.parametrize(("partition", "what"), [("train", "Step 5"), ("val", "The validation of step 5")])
def test_a_step_in_which_no_sample_comes_ends_the_run_with_the_reward_that_hangs(
    partition: str, what: str, queue: Queue, composed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tq, "kv_list", lambda: {partition: dict(queue.tags)})
    monkeypatch.setattr("recipe.soup.verl_adapter.trainer.what_grades", lambda workers: f"{workers[0]} hangs.")
    trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup", "algorithm.soup.max_wait=0.2"))
    trainer.global_steps, trainer.reward_loop_manager = 5, SimpleNamespace(reward_loop_workers=["my_reward"])
    queue.tags["0"] = {"is_prompt": True, "status": "running", "global_steps": 5}
    sentence = f"{what} has waited 0.2 s for a sample, and none came. my_reward hangs. Give .*algorithm.soup.max_wait"
    with pytest.raises(RunEndedError, match=sentence):
        trainer.replay_buffer.sample(global_steps=5, partition_id=partition, batch_size=1)


def test_groups_of_a_checkpoint_are_whole_whatever_their_number_is_now(queue: Queue) -> None:
    """Those that wait; a prompt that is sent out again gets as many samples as this run asks for."""
    lost, buffer = watched(ReplayBufferAsync, refill_fn=lambda number: None)
    for i in range(PROMPTS - 1):
        queue.add(f"old-{i}")
        queue.clear([f"old-{i}_{session}_0" for session in range(3, SAMPLES)], "train")
    queue.tags["again"] = {"is_prompt": True, "status": "running", "global_steps": 1}
    lost.resume(dict(queue.tags))
    queue.add("again")
    _, metrics = buffer.sample(global_steps=5, partition_id="train", batch_size=PROMPTS)
    expected = 3 * (PROMPTS - 1) + SAMPLES
    assert counted(metrics) == [expected, expected, expected, 0]
