"""Check that every process has the plugin and is alive, which verl does not.

verl swallows a plugin that fails to load, waits for ever for a vLLM worker that died during a weight update and for
TransferQueue's processes, and drops every sample that a dead reward worker was to grade.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

import ray
from ray.exceptions import ActorDiedError, RayError

from verl_ext import __version__
from verl_ext.errors import last_line

INTERVAL_SECONDS = 5.0
ANSWER_SECONDS = 5.0
GRACE_SECONDS = 20.0
ENDED = "The run was ended."
"""Part of each sentence that says why a run cannot go on; whoever hides the log finds the sentence by it."""
NOTICE = "Please note: "
"""Beginning of each sentence that whoever hides the log must show."""


class RunEndedError(RuntimeError):
    """A run cannot go on; its words were printed, and hold the whole reason."""


def end_run(reason: str) -> NoReturn:
    """End a run from inside its trainer, with a sentence that the terminal shows.

    Raises:
        RunEndedError: always.
    """
    print(f"{reason} {ENDED}", flush=True)
    raise RunEndedError(f"{reason} {ENDED}")


def _loaded_version(_: Any) -> str | None:
    plugin = sys.modules.get("verl_ext.plugin")
    return __version__ if plugin is not None else None


def handshake(workers: list[Any], replicas: list[Any], agents: list[Any]) -> None:
    """Prove that the plugin is loaded in the driver, in every Ray worker and in every vLLM worker.

    Args:
        workers: verl's training workers (Ray actors).
        replicas: verl's rollout replicas; their vLLM workers must run `verl_ext.vllm_worker.WorkerExtension`.
        agents: verl's agent-loop workers (Ray actors).

    Raises:
        RuntimeError: a process lacks the plugin or has another version of it; the message names the process.
    """
    servers = [server for replica in replicas for server in replica.servers]
    roles = (("training worker", workers), ("vLLM server", servers), ("agent-loop worker", agents))
    versions: list[tuple[str, object]] = [("driver", _loaded_version(None))]
    for role, actors in roles:
        try:
            versions += [(role, v) for v in ray.get([actor.__ray_call__.remote(_loaded_version) for actor in actors])]
        except RayError as error:  # a process without the package cannot even read the question
            versions.append((role, last_line(error)))
    for role, version in versions:
        if version != __version__:
            raise RuntimeError(
                f"The verl plugin verl_ext {__version__} is not loaded in a {role} (found: {version}). Install this "
                "package on every node, and leave VERL_USE_EXTERNAL_PLUGINS unset or at `auto`."
            )
    try:
        ray.get(
            [
                server.collective_rpc.remote("verl_ext_handshake", args=(__version__,))
                for replica in replicas
                for server in replica.servers[:1]  # the first server of a replica speaks for its engine
            ]
        )
    except RayError as error:
        raise RuntimeError(
            f"A vLLM worker does not run verl_ext {__version__}: keep actor_rollout_ref.rollout.engine_kwargs.vllm."
            f"worker_extension_cls=verl_ext.vllm_worker.WorkerExtension. It answered: {last_line(error)}"
        ) from error


def _engine_errored(server: Any) -> bool:
    return server.engine.errored


def _not_dead(_: Any) -> bool:
    return False  # an actor that answers is alive


def transfer_queue_actors(config: Any) -> dict[str, Any]:
    """Return TransferQueue's controller and storage units by name, those that this run started.

    Args:
        config: verl's `transfer_queue`; another storage than `SimpleStorage` has no actors that can be asked.
    """
    places = {"TransferQueue controller": ("TransferQueueController", "transfer_queue")}
    if config.backend.storage_backend == "SimpleStorage":
        units = range(config.backend.SimpleStorage.num_data_storage_units)
        places |= {f"TransferQueue storage unit {i}": (f"TransferQueueStorageUnit#{i}", None) for i in units}
    actors = {}
    for name, (actor, namespace) in places.items():
        with suppress(ValueError):  # there is none of this name in this run: another run on the Ray cluster has it
            actors[name] = ray.get_actor(actor, namespace=namespace)
    return actors


class RolloutWatchdog:
    """Context manager that ends a run whose rollout has died, with a sentence, where verl would hang.

    A thread asks every vLLM server whether its engine is alive, and every other actor whether it is there. When one has
    died, the training workers, which might wait for it for ever, are killed. This raises in the trainer, and the exit
    of this context names the true reason. A trainer that does not notice, because it waits for samples, is ended.

    An actor that is too busy to answer is not asked again until it has answered, and delays no other actor's check.

    Args:
        workers: verl's training workers.
        replicas: verl's rollout replicas.
        agents: verl's agent-loop workers.
        others: further Ray actors, by name, without which samples would be lost or the trainer would wait for ever.
        interval: seconds from one round of questions to the next.

    Raises:
        RuntimeError: on exit, if one of them died.
    """

    def __init__(
        self,
        workers: list[Any],
        replicas: list[Any],
        agents: list[Any],
        others: Mapping[str, Any] | None = None,
        interval: float = INTERVAL_SECONDS,
    ) -> None:
        self._workers = workers
        self._watched: dict[str, tuple[Any, Callable[[Any], bool]]] = {}
        for i, replica in enumerate(replicas):
            self._watched[f"vLLM engine of rollout replica {i}"] = (replica.servers[0], _engine_errored)
        there = {f"agent-loop worker {i}": agent for i, agent in enumerate(agents)} | dict(others or {})
        self._watched |= {name: (actor, _not_dead) for name, actor in there.items()}
        self._asked: dict[str, Any] = {}
        self._interval = interval
        self._stopped = threading.Event()
        self._checking = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="rollout-watchdog", daemon=True)
        self.reason: str | None = None

    def __enter__(self) -> "RolloutWatchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.reason is None:
            self._check()  # the error may be the first sign of it
        self._stopped.set()
        if error is not None and self.reason is not None:
            raise RuntimeError(self.reason) from error

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            if self._check():
                for worker in self._workers:
                    ray.kill(worker)
                if not self._stopped.wait(GRACE_SECONDS):
                    os._exit(1)
                return

    def _check(self) -> bool:
        with self._checking:
            if self.reason is not None:
                return True
            for name, (actor, is_dead) in self._watched.items():
                if name not in self._asked:
                    self._asked[name] = actor.__ray_call__.remote(is_dead)
            questions = list(self._asked.values())
            answered = set(ray.wait(questions, num_returns=len(questions), timeout=ANSWER_SECONDS)[0])
            for name in [name for name, question in self._asked.items() if question in answered]:
                try:
                    dead = ray.get(self._asked.pop(name))
                except ActorDiedError:
                    dead = True
                except RayError:
                    continue  # out of reach for a moment
                if dead:
                    self.reason = (
                        f"The {name} died; its own error stands further up in the log (search for EngineCore, Worker "
                        f"or Traceback). {ENDED}"
                    )
                    print(self.reason, file=sys.stderr, flush=True)
                    return True
            return False
