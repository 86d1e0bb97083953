"""Handshake and watchdog with actors that run in this process. The real ones: tests/recipe/soup/real_path."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError

import verl_ext
import verl_ext.plugin
from verl_ext import health
from verl_ext.health import RolloutWatchdog, handshake


class Actor:
    """Answers `__ray_call__` as Ray would; `ray.get` of the answer runs it."""

    def __init__(self, answer: Callable[[], Any] | None = None, extension: bool = True) -> None:
        self.answer, self.extension, self.killed = answer, extension, False
        self.engine = SimpleNamespace(errored=False)
        self.__ray_call__ = SimpleNamespace(remote=lambda function: lambda: (answer or (lambda: function(self)))())
        self.collective_rpc = SimpleNamespace(remote=lambda method, args: lambda: self._rpc(method, *args))

    def _rpc(self, method: str, version: str) -> None:
        if not self.extension:
            raise RayError(f"no method {method}")
        assert version == verl_ext.__version__


@pytest.fixture(autouse=True)
def ray_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(references: Any, timeout: float | None = None) -> Any:
        return [reference() for reference in references] if isinstance(references, list) else references()

    def wait(questions: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return questions, []

    fake = SimpleNamespace(get=get, wait=wait, kill=lambda actor: setattr(actor, "killed", True))
    monkeypatch.setattr(health, "ray", fake)


def cluster(server: Actor, worker: Actor | None = None, agent: Actor | None = None) -> tuple[list, list, list]:
    return [worker or Actor()], [SimpleNamespace(servers=[server])], [agent or Actor()]


def raiser(error: BaseException) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


def test_handshake_passes_when_everybody_has_the_plugin() -> None:
    handshake(*cluster(Actor()))


def test_handshake_names_a_worker_without_the_plugin() -> None:
    with pytest.raises(RuntimeError, match="not loaded in a training worker"):
        handshake(*cluster(Actor(), Actor(answer=lambda: None)))


def test_handshake_names_a_server_with_another_version() -> None:
    with pytest.raises(RuntimeError, match=r"vLLM server \(found: 9\.9\)"):
        handshake(*cluster(Actor(answer=lambda: "9.9")))


def test_handshake_names_an_agent_loop_worker_on_a_node_without_the_package() -> None:
    missing = Actor(answer=raiser(RayError("No module named 'verl_ext'")))
    with pytest.raises(RuntimeError, match=r"agent-loop worker \(found: No module named 'verl_ext'\)"):
        handshake(*cluster(Actor(), agent=missing))


def test_handshake_names_a_vllm_worker_without_our_extension() -> None:
    with pytest.raises(RuntimeError, match="worker_extension_cls="):
        handshake(*cluster(Actor(extension=False)))


def wait_for_death(watchdog: RolloutWatchdog) -> None:
    deadline = time.monotonic() + 5
    while watchdog.reason is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("error", [None, ActorDiedError()])
def test_watchdog_ends_a_run_whose_engine_died(error: Exception | None) -> None:
    server, worker = Actor(answer=raiser(error) if error else None), Actor()
    server.engine.errored = True

    def train() -> None:
        with RolloutWatchdog(*cluster(server, worker), interval=0.01) as watchdog:
            wait_for_death(watchdog)
            time.sleep(0.05)
            raise ValueError("what the trainer sees when its worker is killed")

    with pytest.raises(RuntimeError, match="vLLM engine of rollout replica 0 died") as ended:
        train()
    assert worker.killed
    assert isinstance(ended.value.__cause__, ValueError)


def test_watchdog_leaves_healthy_and_busy_runs_alone() -> None:
    away = ActorUnavailableError("away", None)
    for server in (Actor(), Actor(answer=raiser(GetTimeoutError())), Actor(answer=raiser(away))):
        worker = Actor()
        with RolloutWatchdog(*cluster(server, worker), interval=0.01) as watchdog:
            time.sleep(0.1)
        assert watchdog.reason is None
        assert not worker.killed


def test_watchdog_asks_a_busy_actor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.ray, "wait", lambda questions, num_returns, timeout: ([], questions))
    server, asked = Actor(), []
    server.__ray_call__.remote = lambda function: asked.append(function) or len(asked)
    watchdog = RolloutWatchdog(*cluster(server))
    assert not watchdog._check()
    assert not watchdog._check()
    assert len(asked) == 1


def test_watchdog_ends_a_run_whose_agent_loop_worker_died() -> None:
    with RolloutWatchdog(*cluster(Actor(), agent=Actor(answer=raiser(ActorDiedError()))), interval=0.01) as watchdog:
        wait_for_death(watchdog)
    assert watchdog.reason is not None
    assert "agent-loop worker 0 died" in watchdog.reason


def test_watchdog_ends_a_trainer_that_does_not_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr(health, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(health, "os", SimpleNamespace(_exit=exits.append))
    server = Actor()
    server.engine.errored = True
    with RolloutWatchdog(*cluster(server), interval=0.01):
        time.sleep(0.3)  # polls for samples
    assert exits == [1]


def test_watchdog_does_not_hide_another_error() -> None:
    with pytest.raises(ValueError, match="mine"), RolloutWatchdog(*cluster(Actor()), interval=10):
        raise ValueError("mine")
