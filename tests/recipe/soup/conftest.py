"""Fixtures for tests on verl's real training worker."""

import socket
from collections.abc import Iterator

import pytest
import torch
import transfer_queue as tq
from training_worker import Store


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(tq, "kv_batch_get", store.get)
    monkeypatch.setattr(tq, "kv_batch_put", store.put)
    return store


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """One rank, as verl's workers expect it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RAY_LOCAL_WORLD_SIZE": "1"}
    patch = pytest.MonkeyPatch()
    for key, value in {**environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        patch.setenv(key, value)
    patch.setenv("VERL_ENGINE_DEVICE", "cuda")
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    patch.undo()
