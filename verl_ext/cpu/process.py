"""Prepare a process for the CPU platform, before it imports verl's modules."""

from functools import partial
from typing import Any

import wrapt

from verl_ext.cpu import platform as _platform  # noqa: F401  (registers the platform with verl)
from verl_ext.cpu.vllm_distribution import install_finder


def _single_backend(distributed: Any) -> None:
    # verl asks for "cpu:gloo,<device>:<backend>", which torch refuses as a duplicate if the device is a CPU.
    distributed.initialize_global_process_group_ray = partial(
        distributed.initialize_global_process_group_ray, backend="gloo"
    )


def _nothing_to_offload(engine: Any) -> None:
    # verl moves the weights of an engine that only reads them (KL's reference policy) to pinned host memory. Here they
    # are in the host's memory already, and torch pins none without an accelerator.
    engine.CPUOffloadPolicy = _no_offload


def _no_offload(pin_memory: bool = True) -> Any:
    from torch.distributed.fsdp import OffloadPolicy

    return OffloadPolicy()


def prepare_process() -> None:
    """Register the platform, and arm the three repairs that verl needs on a CPU. No file of verl is changed."""
    install_finder()
    wrapt.register_post_import_hook(_single_backend, "verl.utils.distributed")
    wrapt.register_post_import_hook(_nothing_to_offload, "verl.workers.engine.fsdp.transformer_impl")
