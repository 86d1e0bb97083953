"""Weights go to the engine of their own run, when several runs share a machine.

verl's trainer hands new weights to its engine through a socket in /tmp, which it names after Ray's job and the replica.
Each Ray counts its jobs from one, and a run without `ray start` has a Ray of its own, so all such runs on a machine use
the same name. Two that sync at the same moment then wait for ever, or an engine samples with the other run's weights,
without a word. Here the name has the Ray node in it, too.
"""

import os
from socket import gethostname
from typing import Any
from zlib import crc32

import wrapt
from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer

RAY_NODE = "RAY_RAYLET_PID"
"""Ray sets it for each worker, and vLLM's processes inherit it: the same at both ends of a socket."""


def socket_of_this_node(handle: str) -> str:
    """Return the socket's address with the process of this Ray node in its name, and a checksum of the host's name.

    Containers that share /tmp number their processes independently.
    """
    stem, suffix = os.path.splitext(handle)
    return f"{stem}-node-{os.environ[RAY_NODE]}-{crc32(gethostname().encode()):08x}{suffix}"


def _rename(init: Any, _: Any, args: tuple, kwargs: dict) -> None:
    def renamed(zmq_handle: str, *args: Any, **kwargs: Any) -> None:
        init(socket_of_this_node(zmq_handle), *args, **kwargs)

    renamed(*args, **kwargs)


for end in ("BucketedWeightSender", "BucketedWeightReceiver"):
    wrapt.wrap_function_wrapper(bucketed_weight_transfer, f"{end}.__init__", _rename)
