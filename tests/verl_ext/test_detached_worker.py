"""Weights that a training worker puts by: verl's helper keeps an alias where they lie on a CPU, ours keeps a copy."""

import inspect
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.trainer.ppo.v1 import trainer_separate_async
from verl.utils.fsdp_utils import fsdp2_sharded_load_from_cpu, fsdp2_sharded_save_to_cpu

from verl_ext.detached_worker import KeepingActorWorker, own_copies


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def module(mesh: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    fully_shard(layers, mesh=mesh)  # in place
    return layers


def whole(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor().clone() for name, tensor in module.state_dict().items()}


def train(module: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def verls_copy(module: torch.nn.Module) -> Any:
    return fsdp2_sharded_save_to_cpu(module)


def test_weights_that_were_put_by_come_back(module: torch.nn.Module) -> None:
    first = whole(module)
    kept, spec = own_copies(verls_copy(module), module)
    train(module)
    assert any(not torch.equal(first[name], tensor) for name, tensor in whole(module).items())
    fsdp2_sharded_load_from_cpu(module, kept, spec)
    assert all(torch.equal(first[name], tensor) for name, tensor in whole(module).items())


def test_verls_own_helper_keeps_an_alias_on_a_cpu(module: torch.nn.Module) -> None:
    """verl.utils.fsdp_utils.fsdp2_sharded_save_to_cpu. If this fails, verl has mended it: drop detached_worker.py."""
    first = whole(module)
    kept, spec = verls_copy(module)
    train(module)
    fsdp2_sharded_load_from_cpu(module, kept, spec)
    assert all(not torch.equal(first[name], tensor) for name, tensor in whole(module).items())


def test_what_is_a_copy_already_is_not_copied_again() -> None:
    module = torch.nn.Linear(2, 2)
    kept = {"weight": module.weight.detach().clone(), "bias": module.bias.detach()}
    copies = own_copies((kept, "spec"), module)
    assert copies[1] == "spec"
    assert copies[0]["weight"] is kept["weight"]
    assert copies[0]["bias"] is not kept["bias"]
    assert torch.equal(copies[0]["bias"], kept["bias"])


def test_the_worker_saves_through_its_copy_handler() -> None:
    """verl.experimental.separation.engine_workers.DetachActorWorker.save_model_to_cpu"""
    assert "self.copy_handler(self.actor.engine.module)" in inspect.getsource(DetachActorWorker.save_model_to_cpu)
    assert isinstance(DetachActorWorker.copy_handler, property)
    worker: Any = object.__new__(KeepingActorWorker)
    worker._strategy_handlers = (lambda module: {"bias": module.bias.detach()}, None)
    module = torch.nn.Linear(2, 2)
    assert worker.copy_handler(module)["bias"].data_ptr() != module.bias.data_ptr()


def test_verls_log_still_gets_a_keyword_that_only_print_knows() -> None:
    """PPOTrainerSeparateAsync._setup. If this fails, verl has mended it: drop `_setup` of SoupSeparateAsyncTrainer."""
    source = inspect.getsource(trainer_separate_async.PPOTrainerSeparateAsync._setup)
    assert "flush=True" in source
    log = trainer_separate_async.logger
    assert log.name == trainer_separate_async.__name__
    with pytest.raises(TypeError):
        log.critical("text", flush=True)  # pyright: ignore[reportCallIssue]
