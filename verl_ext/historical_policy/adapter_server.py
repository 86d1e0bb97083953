"""verl's vLLM server with past LoRA adapters beside the current one, and no answer of the base model by mistake.

verl asks for adapter 123, or for none if the engine has not got it: then the base model would answer, without a word.
"""

from collections import Counter
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import ray
import wrapt
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.lora.request import LoRARequest

from verl_ext.historical_policy.snapshots import Adapter, missing_file

FIRST_ID = 1000
"""vLLM's number of version 0; that of the current policy's adapter is `VLLM_LORA_INT_ID`, below it."""
ROOM = "actor_rollout_ref.rollout.engine_kwargs.vllm"
LOST = (
    f"the engine has no adapter of the current policy (number {VLLM_LORA_INT_ID}), and without it would sample the "
    f"base model; another adapter took its place, or something removed it: raise {ROOM}.max_cpu_loras"
)

_asked: ContextVar[LoRARequest | None] = ContextVar("the past adapter that a request asks for", default=None)


class AdapterError(RuntimeError):
    """An adapter is not there; its words say which."""


class AdapterServer(vLLMHttpServer):
    """Takes `adapter` with a request, and raises where an adapter is missing.

    Attributes:
        fault: the first adapter that was missing, in words.
    """

    fault: str | None = None
    _synced = False
    _past_slots = 0

    async def run_server(self, args: Any) -> None:
        await super().run_server(self._roomy(args))
        self.engine = _Engine(self.engine, self._failed)
        self._running: Counter[int] = Counter()

    async def run_headless(self, args: Any) -> None:
        await super().run_headless(self._roomy(args))

    def _roomy(self, args: Any) -> Any:
        args.max_loras = self.config.engine_kwargs["vllm"]["max_loras"]
        self._past_slots = args.max_loras - 1
        return args

    def _failed(self, why: str) -> AdapterError:
        self.fault = self.fault or why
        return AdapterError(why)

    async def set_global_steps(self, global_steps: int) -> None:
        """Pin the current policy's adapter, which verl has just replaced; at first it sends the base model alone."""
        await super().set_global_steps(global_steps)
        if VLLM_LORA_INT_ID in await self.engine.list_loras():
            await self.engine.pin_lora(VLLM_LORA_INT_ID)
            self._synced = True
        elif self._synced:
            raise self._failed(LOST)

    async def generate(self, *args: Any, adapter: Adapter | None = None, **kwargs: Any) -> TokenOutput:
        """verl's, with the adapter of a past version in place of the current one.

        Raises:
            AdapterError: the adapter is not there, or more of them are asked for than the engine has slots for.
        """
        if adapter is None:
            return await super().generate(*args, **kwargs)
        self._running[adapter.version] += 1
        try:
            # vLLM would put one adapter into another one's slot, and die of it with a mere KeyError: the current
            # one is pinned to a slot even where no running request needs it, and its scheduler does not know that.
            if len(self._running) > self._past_slots:
                why = f"{len(self._running)} past adapters are asked for at once, and the engine has room for"
                raise self._failed(f"{why} {self._past_slots}: raise {ROOM}.max_loras")
            _asked.set(await self._load(adapter))  # a context variable: every request has its own
            output = await super().generate(*args, **kwargs)
        finally:
            _asked.set(None)
            self._running[adapter.version] -= 1
            self._running += Counter()
        output.extra_fields["global_steps"] = adapter.version
        return output

    async def _load(self, adapter: Adapter) -> LoRARequest:
        """vLLM hashes an adapter's name into its prefix cache, so each version has its own."""
        request = LoRARequest(f"v{adapter.version}", FIRST_ID + adapter.version, adapter.folder)
        if request.lora_int_id not in await self.engine.list_loras():
            if (missing := missing_file(Path(adapter.folder))) is not None:
                raise self._failed(f"the adapter of version {adapter.version} cannot be loaded: {missing} is missing")
            try:
                await self.engine.add_lora(request)
            except Exception as error:
                raise self._failed(f"the adapter of version {adapter.version} cannot be loaded: {error}") from error
        return request


class _Engine(wrapt.ObjectProxy):
    """vLLM's engine, asked for the adapter of `_asked` in place of the one that verl asks for."""

    def __init__(self, engine: Any, failed: Any) -> None:
        super().__init__(engine)
        self._self_failed = failed

    def generate(self, *args: Any, lora_request: LoRARequest | None = None, **kwargs: Any) -> Any:
        request = _asked.get() or lora_request
        if request is None:
            return _raise(self._self_failed(LOST))
        return self.__wrapped__.generate(*args, lora_request=request, **kwargs)


async def _raise(error: Exception) -> AsyncIterator[Any]:
    # Not sooner: verl counts a request as waiting until its first answer.
    raise error
    yield


class AdapterReplica(vLLMReplica):
    """verl's replica with such servers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(AdapterServer)


def adapter_fault(replicas: list[Any]) -> str | None:
    """Ask all servers for the first adapter that was missing, if one was."""
    servers = [server for replica in replicas for server in replica.servers[:1]]
    return next(filter(None, ray.get([server.__ray_call__.remote(_fault) for server in servers])), None)


def _fault(server: AdapterServer) -> str | None:
    return server.fault
