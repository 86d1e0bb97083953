"""Past adapters in vLLM itself, behind verl's server, against transformers with each adapter merged by PEFT."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer
from vllm.v1.engine.exceptions import EngineDeadError

from verl_ext.cpu import CPU_ENV
from verl_ext.historical_policy.adapter_server import AdapterError, AdapterServer
from verl_ext.historical_policy.snapshots import Adapter

pytestmark = pytest.mark.real_more

EXACT, CURRENT, TOKENS = 5e-5, -123, 8
"""Nats; the place of the current adapter among versions; tokens of a response."""


class Config(SimpleNamespace):
    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


@pytest.fixture(scope="module")
def base(countdown_dir: Path) -> Path:
    return countdown_dir / "base_model"


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Adapter]:
    """Random ones; the first changes nothing."""
    torch.manual_seed(0)
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    for version in (0, 3, 4, CURRENT):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name and version:
                torch.nn.init.normal_(parameter, std=0.05)
        peft.save_pretrained(str(folder / str(version)))
        made[version] = Adapter(version, str(folder / str(version)))
    return made


def log_probs(base: Path, adapter: Adapter, prompt: list[int], response: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(model, adapter.folder).merge_and_unload()  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        logits = merged(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].numpy()


def served(
    base: Path, current: Adapter, slots: int, monkeypatch: pytest.MonkeyPatch, use: Callable[[Any], Awaitable[None]]
) -> None:
    """verl's server, with our part of it, around a real engine; `use` is run on it."""
    from vllm import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    for key, value in CPU_ENV.items():
        if key.startswith("VLLM_"):
            monkeypatch.setenv(key, value)

    async def run_server(self: Any, args: Any) -> None:
        room: dict[str, Any] = {
            "max_loras": args.max_loras,
            "max_cpu_loras": slots + 1,
            "max_lora_rank": 8,
            "enable_lora": True,
        }
        limits: dict[str, Any] = {
            "max_model_len": 64,
            "enforce_eager": True,
            "dtype": "float32",
            "logprobs_mode": "processed_logprobs",
        }
        limits["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(str(base), **room, **limits))

    monkeypatch.setattr(vLLMHttpServer, "run_server", run_server)
    server: Any = AdapterServer.__new__(AdapterServer)
    server.config = Config(
        engine_kwargs={"vllm": {"max_loras": slots}},
        max_model_len=64,
        response_length=TOKENS,
        prompt_length=16,
        full_determinism=False,
        enable_rollout_routing_replay=False,
        mtp=None,
    )
    server.model_config = SimpleNamespace(lora_rank=4, lora={}, processor=None)
    server.replica_rank, server.global_steps, server._admitting = 0, 5, 0
    server._disaggregation_role, server._submission_paused, server._rejecting = "null", False, False

    async def run() -> None:
        await server.run_server(SimpleNamespace(max_loras=1))
        try:
            await server.engine.add_lora(LoRARequest(str(VLLM_LORA_INT_ID), VLLM_LORA_INT_ID, current.folder))
            await server.set_global_steps(5)
            await use(server)
        finally:
            server.engine.shutdown()

    asyncio.run(run())


async def ask(server: Any, number: int, adapter: Adapter | None) -> Any:
    params = {"max_tokens": TOKENS, "logprobs": True, "ignore_eos": True, "temperature": 1.0, "seed": number}
    more = {} if adapter is None else {"adapter": adapter}
    return await server.generate(prompt_ids=[5, 9, 7], sampling_params=params, request_id=f"{number}", **more)


def off(base: Path, adapter: Adapter, answer: Any) -> float:
    expected = log_probs(base, adapter, [5, 9, 7], list(answer.token_ids))
    return float(np.abs(expected - np.array(answer.log_probs)).max())


def test_several_past_adapters_and_the_current_one_answer_together_exactly(
    base: Path, adapters: dict[int, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    current = adapters[CURRENT]

    async def use(server: Any) -> None:
        wanted = [adapters[version] for version in (0, 3, 4, CURRENT)] * 4
        asked = (ask(server, i, None if a is current else a) for i, a in enumerate(wanted))
        answers = await asyncio.gather(*asked)
        for adapter, answer in zip(wanted, answers, strict=True):
            assert off(base, adapter, answer) < EXACT
            assert min(off(base, other, answer) for other in adapters.values() if other is not adapter) > 1e-2
            version = 5 if adapter is current else adapter.version
            assert answer.extra_fields["global_steps"] == version
        await server.engine.remove_lora(VLLM_LORA_INT_ID)
        await ask(server, 98, adapters[3])  # past ones are still there
        with pytest.raises(AdapterError, match="no adapter of the current policy"):
            await ask(server, 99, None)

    served(base, current, 4, monkeypatch, use)


def test_without_the_limit_vllm_dies_of_too_many_adapters(
    base: Path, adapters: dict[int, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two past adapters in two slots of which one is pinned."""
    first, second = adapters[3], adapters[4]

    async def use(server: Any) -> None:
        with pytest.raises(AdapterError, match="room for 1"):
            await asyncio.gather(ask(server, 0, first), ask(server, 1, second))
        server._past_slots = 2  # vLLM's scheduler takes both
        wanted = [first, second] * 4
        with pytest.raises(EngineDeadError):
            await asyncio.gather(*(ask(server, i, adapter) for i, adapter in enumerate(wanted)))

    served(base, adapters[CURRENT], 2, monkeypatch, use)
