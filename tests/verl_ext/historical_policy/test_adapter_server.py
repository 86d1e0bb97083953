"""The server with past adapters, around an engine that only says for which adapter it was asked."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

from verl_ext.historical_policy.adapter_server import AdapterError, AdapterServer
from verl_ext.historical_policy.snapshots import ADAPTER_FILES, Adapter


class Engine:
    """Keeps what it was asked; `answers` is set when it may answer."""

    def __init__(self) -> None:
        self.loras: set[int] = {VLLM_LORA_INT_ID}
        self.asked: list[Any] = []
        self.pinned: list[int] = []
        self.answers = asyncio.Event()
        self.answers.set()

    async def list_loras(self) -> set[int]:
        return self.loras

    async def add_lora(self, request: Any) -> None:
        json.loads((Path(request.lora_path) / ADAPTER_FILES[0]).read_text())
        self.loras.add(request.lora_int_id)

    async def pin_lora(self, number: int) -> None:
        self.pinned.append(number)

    async def generate(self, *args: Any, lora_request: Any, **kwargs: Any) -> AsyncIterator[Any]:
        self.asked.append(lora_request)
        await self.answers.wait()
        logprob = [{7: SimpleNamespace(logprob=-0.5)}]
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7], logprobs=logprob, finish_reason="length")])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> AdapterServer:
    """verl's own `generate` on a fake engine."""
    made: Any = AdapterServer.__new__(AdapterServer)

    async def run_server(self: Any, args: Any) -> None:
        self.engine, self.given = Engine(), args

    monkeypatch.setattr(vLLMHttpServer, "run_server", run_server)

    class Config(SimpleNamespace):
        def get(self, name: str, default: Any = None) -> Any:
            return getattr(self, name, default)

    made.config = Config(
        engine_kwargs={"vllm": {"max_loras": 2}},
        max_model_len=32,
        response_length=8,
        prompt_length=8,
        full_determinism=False,
        enable_rollout_routing_replay=False,
        mtp=None,
    )
    made.model_config = SimpleNamespace(lora_rank=4, lora={}, processor=None)
    made.replica_rank, made.global_steps, made._admitting = 0, 5, 0
    made._disaggregation_role, made._submission_paused, made._rejecting = "null", False, False
    asyncio.run(made.run_server(SimpleNamespace(max_loras=1)))
    assert made.given.max_loras == 2  # verl's 1 put back
    return made


def adapter(folder: Path, version: int) -> Adapter:
    folder = folder / f"version_{version}"
    folder.mkdir(exist_ok=True)
    for name in ADAPTER_FILES:
        (folder / name).write_text("{}")
    return Adapter(version, str(folder))


def ask(server: Any, past: Adapter | None = None) -> Any:
    sampling = {"max_tokens": 1, "logprobs": True}
    more = {} if past is None else {"adapter": past}
    return server.generate(prompt_ids=[1, 2], sampling_params=sampling, request_id="x", **more)


def test_each_request_gets_its_own_adapter_and_version(server: Any, tmp_path: Path) -> None:
    old = adapter(tmp_path, 3)

    async def both() -> list[Any]:
        return await asyncio.gather(ask(server, old), ask(server), ask(server, old), ask(server))

    answers = asyncio.run(both())
    names = [request.lora_name for request in server.engine.asked]
    assert sorted(names) == ["123", "123", "v3", "v3"]
    assert [answer.extra_fields["global_steps"] for answer in answers] == [3, 5, 3, 5]
    [past] = {(r.lora_int_id, r.lora_path) for r in server.engine.asked if r.lora_name == "v3"}
    assert past == (1003, old.folder)
    assert server.fault is None


def test_without_the_current_adapter_nobody_answers(server: Any, tmp_path: Path) -> None:
    server.engine.loras.clear()
    with pytest.raises(AdapterError, match="the engine has no adapter of the current policy"):
        asyncio.run(ask(server))
    assert server.engine.asked == []
    assert server._admitting == 0  # verl waits for this number before it syncs
    assert "number 123" in server.fault


def test_a_past_adapter_that_is_gone_is_told_by_its_file(server: Any, tmp_path: Path) -> None:
    old = adapter(tmp_path, 3)
    file = Path(old.folder) / ADAPTER_FILES[1]
    file.unlink()
    with pytest.raises(AdapterError, match=r"version 3 cannot be loaded: .*adapter_model.safetensors is missing"):
        asyncio.run(ask(server, old))
    assert str(file) in server.fault
    file.touch()
    (Path(old.folder) / ADAPTER_FILES[0]).write_text("{")
    with pytest.raises(AdapterError, match="version 3 cannot be loaded: Expecting"):
        asyncio.run(ask(server, old))


def test_more_adapters_than_slots_beside_the_pinned_one_are_refused(server: Any, tmp_path: Path) -> None:
    first, second = adapter(tmp_path, 3), adapter(tmp_path, 4)

    async def at_once() -> None:
        server.engine.answers.clear()
        running = asyncio.create_task(ask(server, first))
        while not server.engine.asked:
            await asyncio.sleep(0)
        with pytest.raises(AdapterError, match="2 past adapters are asked for at once, and the engine has room for 1"):
            await ask(server, second)
        server.engine.answers.set()
        await running
        await ask(server, second)  # one after the other is fine

    asyncio.run(at_once())


def test_the_current_adapter_is_pinned_after_each_sync_and_missed(server: Any) -> None:
    """verl's first sync sends the base model, and then the adapter."""
    server.engine.loras.clear()
    asyncio.run(server.set_global_steps(0))
    assert server.engine.pinned == []
    server.engine.loras.add(VLLM_LORA_INT_ID)
    asyncio.run(server.set_global_steps(0))
    asyncio.run(server.set_global_steps(1))
    assert server.engine.pinned == [VLLM_LORA_INT_ID] * 2
    server.engine.loras.clear()
    with pytest.raises(AdapterError, match="has no adapter of the current policy"):
        asyncio.run(server.set_global_steps(2))
