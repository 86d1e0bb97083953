"""The watchdog with real Ray actors, which die as the kernel kills them."""

import inspect
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import transfer_queue.interface as transfer_queue_interface
import transfer_queue.storage.bootstrap.simple_storage_bootstrap as simple_storage_bootstrap
from omegaconf import OmegaConf
from ray.exceptions import RayActorError
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.experimental.reward_loop.reward_loop import RewardLoopManager

from verl_ext.causes import KILLED, own_words
from verl_ext.health import ENDED, RolloutWatchdog, transfer_queue_actors

SIMPLE = {"storage_backend": "SimpleStorage", "SimpleStorage": {"num_data_storage_units": 2}}
QUEUE = OmegaConf.create({"backend": SIMPLE})
SOON = 10.0  # seconds


@pytest.fixture(scope="module")
def grader() -> Iterator[Any]:
    ray.shutdown()  # which a test before this one may have made start by itself
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)

    class Grader:
        """As verl's reward workers: asynchronous, with the user's function in it."""

        async def compute_score(self, seconds: float) -> float:
            time.sleep(seconds)  # a function that lets nobody else have the process
            return seconds

    yield ray.remote(Grader)
    ray.shutdown()


def kill(actor: Any) -> None:
    os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)


def reason_within(watchdog: RolloutWatchdog, seconds: float) -> str | None:
    deadline = time.monotonic() + seconds
    while watchdog.reason is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return watchdog.reason


def test_an_actor_that_was_killed_is_named_in_few_words(grader: Any) -> None:
    actor = grader.remote()
    ray.get(actor.compute_score.remote(0))
    kill(actor)
    with pytest.raises(RayActorError) as caught:
        ray.get(actor.compute_score.remote(0))
    words = own_words(caught.value)
    assert words.startswith("ActorDiedError: The actor died unexpectedly before finishing this task. class_name: ")
    assert words.endswith(f"Grader {KILLED}")


def test_a_dead_reward_worker_is_named_though_another_is_busy(grader: Any, capsys: pytest.CaptureFixture[str]) -> None:
    idle, busy, dying, trainer = (grader.remote() for _ in range(4))
    ray.get([actor.compute_score.remote(0) for actor in (idle, busy, dying, trainer)])
    busy.compute_score.remote(60)
    others = {f"reward worker {i}": actor for i, actor in enumerate((idle, busy, dying))}

    def train() -> None:
        with RolloutWatchdog([trainer], [], [], others, interval=0.2) as watchdog:
            assert reason_within(watchdog, 1) is None
            kill(dying)
            assert reason_within(watchdog, SOON) is not None
            ray.get(trainer.compute_score.remote(60))  # what the trainer waits for is killed

    with pytest.raises(RuntimeError, match="The reward worker 2 died"):
        train()
    assert ENDED in capsys.readouterr().err


def test_the_transfer_queues_processes_are_found_and_named(grader: Any) -> None:
    controller = grader.options(name="TransferQueueController", namespace="transfer_queue").remote()
    units = [grader.options(name=f"TransferQueueStorageUnit#{i}").remote() for i in range(2)]
    ray.get([actor.compute_score.remote(0) for actor in (controller, *units)])
    actors = transfer_queue_actors(QUEUE)
    assert list(actors) == ["TransferQueue controller", "TransferQueue storage unit 0", "TransferQueue storage unit 1"]
    with RolloutWatchdog([], [], [], actors, interval=0.2) as watchdog:
        assert reason_within(watchdog, 1) is None
        kill(units[1])
        reason = reason_within(watchdog, SOON)
    assert reason is not None
    assert "The TransferQueue storage unit 1 died" in reason


def test_the_transfer_queues_names_are_these() -> None:
    """A client that asks a dead one waits for ever: tried with 0.1.11, for a minute each."""
    controller = inspect.getsource(transfer_queue_interface)
    assert 'name="TransferQueueController", namespace="transfer_queue"' in controller
    assert '"name": f"TransferQueueStorageUnit#{storage_unit_rank}"' in inspect.getsource(simple_storage_bootstrap)


def test_a_dead_reward_worker_goes_on_losing_samples_in_verl() -> None:
    """Each sample asks one of them at random, and what that raises is the sample's own error."""
    assert "random.choice(self.reward_loop_worker_handles)" in inspect.getsource(AgentLoopWorker._compute_score)
    assert "self.reward_loop_workers.append" in inspect.getsource(RewardLoopManager._init_reward_loop_workers)
