"""Did new weights reach the engine? A sync that sends the old ones, or none, looks like staleness for ever.

Each vLLM worker notes a checksum of what arrives, and is asked after a sync (`vllm_worker.WorkerExtension`).
"""

import re
from collections.abc import Iterable
from typing import Any

import ray
import torch
from ray.exceptions import RayError

BLOCK = 1024
SAME_TYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes."""
MIX = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd number of 64 bits without a pattern."""
ANSWER = re.compile(r"\[stale weights: (.*?)\]")
"""In the error that a worker answers with; verl's servers pass on no answer but an error."""

Checksum = list[int]


def checksum(weight: torch.Tensor) -> torch.Tensor:
    """Add up a weight's bits.

    Sums of blocks come first, in the weight's own width: one pass at the speed of the memory, and no copy of the
    weight. Then the block's place is added and the whole squared: in bfloat16 many changes are one unit up or down, and
    in a plain sum they would cancel each other now and then.

    Args:
        weight: any type and shape.

    Returns:
        (), int64.
    """
    bits = weight.contiguous().flatten().view(SAME_TYPE[weight.element_size()])
    whole = bits.numel() // BLOCK * BLOCK
    blocks = torch.cat([bits[:whole].view(-1, BLOCK).sum(1, dtype=bits.dtype), bits[whole:]]).long()
    places = torch.arange(1, len(blocks) + 1, device=blocks.device) * MIX
    return (blocks + places).square().sum()


class Arrivals:
    """What one worker got.

    A sync may have several buckets of weights; with LoRA the first one sends base weights, and then adapters only.
    """

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] | None = None
        self._before: Checksum | None = None

    def begin(self) -> None:
        """A sync begins, or its next part, of which the last one counts."""
        self._sums = []

    def add(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Some weights arrived; nothing waits for the device."""
        if self._sums is None:
            self._sums = []
        self._sums += [checksum(weight) for _, weight in weights]

    def settle(self) -> str | None:
        """End the time from the last call to this one; returns what speaks against new weights in it, if anything."""
        sums, self._sums = self._sums, None
        if not sums:
            return "no weights reached a vLLM worker"
        before, self._before = self._before, torch.stack(sums).tolist()
        return f"a vLLM worker got the same {len(sums)} weights as before" if self._before == before else None


def stale_weights(replicas: list[Any]) -> str | None:
    """Ask all workers what arrived since the last question; returns what speaks against new weights, if anything.

    Args:
        replicas: verl's rollout replicas with vLLM, whose workers run `verl_ext.vllm_worker.WorkerExtension`.

    Raises:
        RayError: a server did not answer.
    """
    # The first server of a replica speaks for its engine.
    servers = [server for replica in replicas for server in replica.servers[:1]]
    try:
        ray.get([server.collective_rpc.remote("verl_ext_new_weights") for server in servers])
    except RayError as error:
        found = ANSWER.search(str(error))
        if found is None:
            raise
        return found[1]
    return None
