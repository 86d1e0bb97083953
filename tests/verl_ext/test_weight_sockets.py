"""Two runs on one machine, each with a Ray of its own, whose first job has the same number."""

import asyncio
import time
from collections.abc import Iterator
from threading import Thread
from uuid import uuid4

import pytest
import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender

RAY_NODE = "RAY_RAYLET_PID"  # as Ray sets it; verl_ext.weight_sockets came with verl, as its plugin


class Run:
    """The two ends of one run's weight sync; all its weights have one value."""

    def __init__(self, handle: str, value: float) -> None:
        self.value = value
        self.received: set[float] = set()
        self._sender = BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
        self._receiver = BucketedWeightReceiver(handle, torch.device("cpu"), use_shm=True)
        self._ends = [Thread(target=end, daemon=True) for end in (self._send, self._receive)]

    def _send(self) -> None:
        asyncio.run(self._sender.async_send_weights(self._weights()))

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in range(3):
            yield f"layer {layer}", torch.full((200_000,), self.value)

    def _receive(self) -> None:
        self._receiver.receive_weights(lambda weights, last: self.received.update(w[0].item() for _, w in weights))

    def start_sending(self) -> None:
        self._ends[0].start()
        time.sleep(0.2)  # until it has bound its socket, and waits

    def receive(self) -> bool:
        """Whether weights came within some seconds, and both ends are done."""
        self._ends[1].start()
        for end in self._ends:
            end.join(5)
        return not any(end.is_alive() for end in self._ends)


def test_runs_that_sync_at_the_same_moment_get_their_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = f"ipc:///tmp/verl-ext-test-{uuid4()}-replica-0-rank-0.sock"
    runs = []
    for pid, value in (("100", 1.0), ("200", 2.0)):
        monkeypatch.setenv(RAY_NODE, pid)
        runs.append(Run(handle, value))
    for run in runs:
        run.start_sending()
    for run in runs:
        arrived = run.receive()
        assert run.received == {run.value}
        assert arrived
