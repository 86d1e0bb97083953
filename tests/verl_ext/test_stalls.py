"""Waiting for samples that never come, with verl's own replay buffers and reward workers as verl makes them."""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import transfer_queue as tq
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from verl_ext.stalls import StallWatch, busy_places, what_grades

RUNNING = {"is_prompt": True, "status": "running", "global_steps": 1}
FINISHED = RUNNING | {"status": "finished"}


class StalledError(Exception):
    pass


class Buffer:
    """What a watch asks of verl's, in which nothing ever moves."""

    sample = wait_for_sampleable = _wait_for_next_poll = staticmethod(lambda *_: None)
    partitions = pending_keys = running_keys = finished_keys = failure_keys = {"train": ()}  # noqa: RUF012


def stalled(partition_id: str) -> None:
    raise StalledError(partition_id)


def sample(
    cls: Any, monkeypatch: pytest.MonkeyPatch, listed: Callable[[], dict], seconds: float, partition: str
) -> Any:
    monkeypatch.setattr(tq, "kv_list", lambda: {partition: listed()})
    monkeypatch.setattr(tq, "kv_clear", lambda **_: None)
    common: Any = {"trainer_mode": "", "trainer_config": {}, "max_off_policy_threshold": None, "sampler_kwargs": {}}
    buffer = cls(**common, max_off_policy_strategy="drop", poll_interval=0.01, refill_fn=None)
    StallWatch(seconds, stalled).watch(buffer)
    return buffer.sample(global_steps=1, partition_id=partition, batch_size=2)


@pytest.mark.parametrize("cls", [ReplayBuffer, ReplayBufferAsync])
@pytest.mark.parametrize("partition", ["train", "val"])
def test_a_step_without_samples_ends_and_one_that_moves_on_does_not(
    cls: Any, partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StalledError, match=partition):
        sample(cls, monkeypatch, lambda: {"a": RUNNING, "a_0_0": {}}, 0.1, partition)

    began, came = time.monotonic(), {"a": RUNNING, "b": RUNNING}

    def one_after_another() -> dict:
        number = int((time.monotonic() - began) / 0.1)  # a sample each tenth of a second, for longer than the wait
        came.update({f"a_{i}_0": {} for i in range(number)})
        return came | ({"a": FINISHED, "b": FINISHED} if number > 8 else {})

    batch, _ = sample(cls, monkeypatch, one_after_another, 0.4, partition)
    assert len(batch.keys) > 8


def test_each_step_waits_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update between two samplings is no wait for samples."""
    watch = StallWatch(5.0, stalled)
    clock = iter([0.0, 100.0, 104.0, 106.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))

    buffer: Any = Buffer()
    watch.watch(buffer)
    buffer._wait_for_next_poll("train", 0)
    buffer.sample()
    buffer._wait_for_next_poll("train", 0)
    buffer._wait_for_next_poll("train", 0)
    with pytest.raises(StalledError):
        buffer._wait_for_next_poll("train", 0)


def test_threads_with_nothing_to_do_are_not_named() -> None:
    hold, started = threading.Event(), threading.Event()

    def my_reward() -> None:
        started.set()
        hold.wait(30)

    with ThreadPoolExecutor(2) as pool:
        pool.submit(int).result()
        assert not any(test_threads_with_nothing_to_do_are_not_named.__name__ in place for place in busy_places(None))
        pool.submit(my_reward)
        assert started.wait(5)
        try:
            assert any(place.startswith(f"my_reward ({__file__}, line ") for place in busy_places(None))
        finally:
            hold.set()


@pytest.fixture(scope="module")
def grader() -> Iterator[Any]:
    ray.shutdown()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)

    def my_own_reward(seconds: float) -> None:  # a worker cannot import this file
        time.sleep(seconds)

    class Grader:
        """As verl's reward workers: asynchronous, with the user's function in a thread or in the loop."""

        async def grade(self, seconds: float) -> None:
            await asyncio.get_running_loop().run_in_executor(None, my_own_reward, seconds)

        async def grade_in_the_loop(self, seconds: float) -> None:
            time.sleep(seconds)

    yield ray.remote(Grader)
    ray.shutdown()


def test_the_reward_that_hangs_is_named(grader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [grader.remote(), grader.remote()]
    ray.get([worker.grade.remote(0) for worker in workers])
    assert what_grades(workers).startswith("No reward is being computed")
    for _ in range(3):
        workers[1].grade.remote(60)
    time.sleep(0.5)
    said = what_grades(workers)
    assert said.startswith("A reward is still being computed: my_own_reward (")
    assert said.endswith(", 3 times.")
    monkeypatch.setattr("verl_ext.stalls.ANSWER_SECONDS", 1.0)
    workers = [grader.remote()]
    ray.get(workers[0].grade.remote(0))
    workers[0].grade_in_the_loop.remote(60)
    time.sleep(0.5)
    assert what_grades(workers).startswith("1 of 1 reward workers do not answer")


def test_the_methods_of_verl_that_are_wrapped_and_the_pool_in_which_it_grades() -> None:
    for cls in (ReplayBuffer, ReplayBufferAsync):
        source = inspect.getsource(cls.sample) + inspect.getsource(getattr(cls, "wait_for_sampleable", cls.sample))
        assert "self._wait_for_next_poll(partition_id, last_debug_time)" in source
    assert "self.loop.run_in_executor(" in inspect.getsource(NaiveRewardManager.run_single)


def test_a_wait_before_the_sampling_is_a_wait_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's separate_async asks by itself whether enough is there, after its updates."""
    assert callable(ReplayBufferAsync.wait_for_sampleable)
    watch, clock = StallWatch(5.0, stalled), iter([0.0, 100.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))

    buffer: Any = Buffer()
    watch.watch(buffer)
    buffer._wait_for_next_poll("train", 0)
    buffer.wait_for_sampleable()
    buffer._wait_for_next_poll("train", 0)
