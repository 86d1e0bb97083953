"""Whether new weights reached the engine: verl's worker extension and ours on it, Ray's answers in this process."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer, utils
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.model_executor.model_loader import utils as vllm_loader

from verl_ext import weight_arrivals
from verl_ext.vllm_worker import WorkerExtension
from verl_ext.weight_arrivals import BLOCK, Arrivals, checksum, stale_weights

Weights = list[tuple[str, torch.Tensor]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (BLOCK,), (7, 513)])
def test_a_checksum_is_of_every_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape).mul(50).to(dtype)
    before = checksum(weight)
    assert before.dtype == torch.int64
    assert torch.equal(before, checksum(weight.clone()))
    bits = weight.flatten().view(torch.uint8)
    for place in {0, len(bits) // 2, len(bits) - 1} if len(bits) else ():
        bits[place] ^= 1
        assert not torch.equal(before, checksum(weight)), place
        bits[place] ^= 1
    assert torch.equal(before, checksum(weight))


def test_units_up_and_down_do_not_cancel() -> None:
    """What a small learning rate does to bfloat16; a plain sum would be the same in a third of these cases or more."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, BLOCK, generator=generator).bfloat16()
    before = checksum(weight)
    for _ in range(500):
        changed = weight.clone()
        bits = changed.view(torch.int16)
        bits[torch.randint(64, (1,), generator=generator), 5] += 1
        bits[torch.randint(64, (1,), generator=generator), 9] -= 1
        same = torch.equal(changed.view(torch.int16).sum(1), weight.view(torch.int16).sum(1))  # both in one block
        assert torch.equal(checksum(changed), before) == same


def test_a_transposed_weight_is_read_as_it_is_seen() -> None:
    weight = torch.randn(5, 4)
    assert torch.equal(checksum(weight.T), checksum(weight.T.contiguous()))


def sent(*values: float) -> Weights:
    return [(str(value), torch.tensor([value])) for value in values]


def test_what_the_last_part_of_a_sync_brought_is_compared() -> None:
    """verl's first sync with LoRA sends base weights and then adapters, the others send adapters."""
    arrivals = Arrivals()
    arrivals.begin()
    arrivals.add(sent(1, 2))
    arrivals.begin()
    arrivals.add(sent(0))
    assert arrivals.settle() is None
    arrivals.begin()
    arrivals.add(sent(0))
    assert arrivals.settle() == "a vLLM worker got the same 1 weights as before"
    arrivals.begin()
    arrivals.add(sent(0.5))
    assert arrivals.settle() is None
    assert arrivals.settle() == "no weights reached a vLLM worker"
    arrivals.begin()
    assert arrivals.settle() == "no weights reached a vLLM worker"
    arrivals.begin()
    arrivals.add(sent(0.5))
    assert arrivals.settle() == "a vLLM worker got the same 1 weights as before"


class Worker(WorkerExtension):
    """Our extension on verl's, with a model that takes anything."""

    def __new__(cls) -> "Worker":
        worker: Any = object.__new__(cls)
        worker._arrivals = Arrivals()
        worker._is_qat_model = worker._is_modelopt_qat = False
        return worker

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.rank, self.parallel_config = 0, SimpleNamespace(world_size=1)
        self.loaded: dict[str, torch.Tensor] = {}
        config = SimpleNamespace(quant_config=None, speculative_config=None, model_config=None)
        self.model_runner = SimpleNamespace(model=torch.nn.Linear(1, 1), vllm_config=config)

    def _get_zmq_handle(self) -> str:
        return ""

    def remove_lora(self, _: int) -> None: ...

    def add_lora(self, request: Any) -> None:
        self.loaded |= request.lora_tensors


@pytest.mark.parametrize("peft", [None, {"r": 4}])
def test_verls_receiver_passes_every_bucket_to_the_checksum(peft: dict | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole sync through verl's `update_weights_from_ipc`, with base weights or an adapter, in two buckets."""
    worker, buckets = Worker(), [sent(1, 2), sent(3)]

    def receive(self: Any, on_bucket_received: Any) -> None:
        for i, bucket in enumerate(buckets):
            on_bucket_received(bucket, i == len(buckets) - 1)

    monkeypatch.setattr(bucketed_weight_transfer.BucketedWeightReceiver, "__init__", lambda self, **_: None)
    monkeypatch.setattr(bucketed_weight_transfer.BucketedWeightReceiver, "receive_weights", receive)
    monkeypatch.setattr(vllm_loader, "process_weights_after_loading", lambda *_: None)
    monkeypatch.setattr(utils, "patch_vllm_moe_model_weight_loader", lambda _: None)
    monkeypatch.setattr(os, "_exit", lambda _: pytest.fail("the worker would have died"))
    monkeypatch.setattr(worker.model_runner.model, "load_weights", lambda weights: list(weights), raising=False)
    assert WorkerExtension._update_weights is not vLLMColocateWorkerExtension._update_weights

    def sync() -> None:
        worker.update_weights_from_ipc(peft_config=peft, base_sync_done=peft is not None)

    sync()
    assert len(worker._arrivals._sums or ()) == 3
    worker.verl_ext_new_weights()
    sync()
    with pytest.raises(RuntimeError, match=r"\[stale weights: a vLLM worker got the same 3 weights as before\]"):
        worker.verl_ext_new_weights()
    buckets[1] = sent(3.5)
    sync()
    worker.verl_ext_new_weights()


def test_of_several_ranks_the_last_one_answers() -> None:
    """vLLM raises at the first error it reads, and would take what other ranks answered for their next answer."""
    import inspect

    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.worker.worker_base import WorkerBase

    source = inspect.getsource(WorkerBase.__init__)
    assert "self.rank = rank" in source
    assert "self.parallel_config = vllm_config.parallel_config" in source
    assert "for mq in response_mqs" in inspect.getsource(MultiprocExecutor.collective_rpc)
    ranks: list[Any] = [Worker(), Worker()]
    for rank, worker in enumerate(ranks):
        worker.rank, worker.parallel_config = rank, SimpleNamespace(world_size=2)
    ranks[0].verl_ext_new_weights()
    with pytest.raises(RuntimeError, match=r"\[stale weights: no weights reached"):
        ranks[1].verl_ext_new_weights()


class Server:
    """Answers as verl's server does: with nothing, or with an error in Ray's and vLLM's wrapping."""

    def __init__(self, error: str | None = None) -> None:
        self.error = error
        self.collective_rpc = SimpleNamespace(remote=lambda method: self)

    def answer(self) -> None:
        if self.error is not None:
            cause = RuntimeError(f"Worker failed with error '{self.error}', please check the stack trace above")
            raise RayTaskError("collective_rpc", f"Traceback\n{cause}\n", cause).as_instanceof_cause()


def test_the_first_server_of_every_replica_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(get=lambda servers: [server.answer() for server in servers])
    monkeypatch.setattr(weight_arrivals, "ray", fake)
    fine, stale, broken = Server(), Server("[stale weights: the same 3]"), Server("out of memory")
    replicas = [SimpleNamespace(servers=[fine, broken]), SimpleNamespace(servers=[fine])]
    assert stale_weights(replicas) is None
    assert stale_weights([*replicas, SimpleNamespace(servers=[stale])]) == "the same 3"
    assert stale_weights([]) is None
    with pytest.raises(RuntimeError, match="out of memory"):
        stale_weights([SimpleNamespace(servers=[broken])])
