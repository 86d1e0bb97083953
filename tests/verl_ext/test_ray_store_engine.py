"""Weights through Ray's object store and a mailbox; Ray is a dictionary and a plain object here."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from verl.checkpoint_engine.base import CheckpointEngineManager, CheckpointEngineRegistry

from verl_ext import mailbox, ray_store_engine
from verl_ext.historical_policy import writing
from verl_ext.ray_store_engine import BACKEND, RayStoreEngine

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor([7])}


class Reference:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from ()
        return self.value


class Handle:
    """An actor's handle: each method has `remote`, which begins at once."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: asyncio.ensure_future(getattr(self.actor, name)(*args)))


@pytest.fixture(autouse=True)
def ray_in_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    plain: Any = mailbox.Mailbox
    actor = plain.__ray_metadata__.modified_class()
    monkeypatch.setattr(writing, "ray", SimpleNamespace(put=Reference))
    monkeypatch.setattr(ray_store_engine, "Mailbox", SimpleNamespace(remote=lambda: Handle(actor)))
    monkeypatch.setattr(RayStoreEngine, "_made", None)
    return actor


async def sync(senders: list[RayStoreEngine], readers: list[RayStoreEngine], weights: Any, early: bool) -> list[Any]:
    """One weight sync as `CheckpointEngineManager.update_weights` makes it."""
    for_senders, for_readers = RayStoreEngine.build_topology(len(senders), len(readers), [])
    for engines, given in ((senders, for_senders), (readers, for_readers)):
        for i, engine in enumerate(engines):
            engine.init_process_group(**{name: values[i] for name, values in given.items()})

    async def read(engine: RayStoreEngine) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() async for name, tensor in engine.receive_weights(1)}

    sent = [engine.send_weights(iter(weights.items()), 1) for engine in senders]
    got = [read(engine) for engine in readers]
    both = await asyncio.gather(*(got + sent if early else sent + got))
    received = both[: len(readers)] if early else both[len(senders) :]
    for engine in senders + readers:
        engine.finalize()
    await asyncio.sleep(0)
    return received


@pytest.mark.parametrize("early", [False, True])
def test_every_reader_gets_the_weights_of_its_own_sync(ray_in_process: Any, early: bool) -> None:
    """Also where it asks before they are sent, as it may."""

    async def syncs() -> None:
        senders = [RayStoreEngine(20, is_master=True), RayStoreEngine(20)]
        readers = [RayStoreEngine(20), RayStoreEngine(20)]
        for factor in (1, 2):
            weights = {name: tensor * factor for name, tensor in WEIGHTS.items()}
            for received in await sync(senders, readers, weights, early):
                assert received.keys() == weights.keys()
                assert all(torch.equal(received[name], tensor) for name, tensor in weights.items())
        assert not ray_in_process._letters  # nothing is kept in Ray's store

    asyncio.run(syncs())


def test_it_is_an_engine_of_verls() -> None:
    """verl.checkpoint_engine.base.CheckpointEngineRegistry"""
    assert CheckpointEngineRegistry.get(BACKEND) is RayStoreEngine
    config: Any = SimpleNamespace(backend=BACKEND, custom_backend_module=ray_store_engine.__name__)
    group: Any = None
    assert CheckpointEngineManager(config, group, []).backend_cls is RayStoreEngine
