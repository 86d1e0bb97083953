"""Is everything there, and is it still alive? Checks that verl does not make.

verl swallows a plugin that fails to load, and waits for ever for a vLLM worker that died during a weight update.
"""

import sys
import threading
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from verl_ext import __version__

INTERVAL_SECONDS = 5.0
ANSWER_SECONDS = 20.0


def _loaded_version(_: Any) -> str | None:
    plugin = sys.modules.get("verl_ext.plugin")
    return __version__ if plugin is not None else None


def handshake(worker_group: Any, replicas: list[Any]) -> None:
    """Prove that the plugin is loaded in the driver, in every Ray worker and in every vLLM worker.

    Args:
        worker_group: verl's RayWorkerGroup of training workers.
        replicas: verl's rollout replicas; their vLLM workers must run `verl_ext.vllm_worker.WorkerExtension`.

    Raises:
        RuntimeError: naming the process that lacks the plugin, or has another version of it.
    """
    actors = [("training worker", actor) for actor in worker_group.workers]
    actors += [("vLLM server", server) for replica in replicas for server in replica.servers]
    versions = ray.get([actor.__ray_call__.remote(_loaded_version) for _, actor in actors])
    for (role, _), version in zip([("driver", None), *actors], [_loaded_version(None), *versions], strict=True):
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
            f"worker_extension_cls=verl_ext.vllm_worker.WorkerExtension. It answered: {str(error).splitlines()[-1]}"
        ) from error


def _engine_errored(server: Any) -> bool:
    return server.engine.errored


class RolloutWatchdog:
    """Context manager that ends a run whose vLLM engine died, with a sentence instead of a hang.

    A thread asks every server whether its engine lives. When one does not, the training workers, which would wait for
    it for ever, are killed; that raises in the trainer, and the exit of this context names the true reason.

    Raises:
        RuntimeError: on exit, if an engine died.
    """

    def __init__(self, worker_group: Any, replicas: list[Any], interval: float = INTERVAL_SECONDS) -> None:
        self._workers = list(worker_group.workers)
        self._servers = [server for replica in replicas for server in replica.servers[:1]]
        self._interval = interval
        self._stopped = threading.Event()
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
                return

    def _check(self) -> bool:
        for index, server in enumerate(self._servers):
            try:
                dead = ray.get(server.__ray_call__.remote(_engine_errored), timeout=ANSWER_SECONDS)
            except GetTimeoutError:
                continue  # busy, not dead
            except RayError:
                dead = True
            if dead:
                self.reason = (
                    f"The vLLM engine of rollout replica {index} died; its own error stands further up in the log "
                    "(search for EngineCore, Worker or Traceback). The run was ended."
                )
                print(self.reason, file=sys.stderr, flush=True)
                return True
        return False
