"""What one process needs before verl's modules are imported on the CPU platform."""

from functools import partial
from typing import Any

import wrapt

from verl_ext.cpu import platform as _platform  # noqa: F401  (registers the platform with verl)
from verl_ext.cpu.vllm_distribution import install_finder


def _single_backend(distributed: Any) -> None:
    # verl asks for "cpu:gloo,<device>:<backend>"; with a CPU device torch refuses that as a duplicate.
    distributed.initialize_global_process_group_ray = partial(
        distributed.initialize_global_process_group_ray, backend="gloo"
    )


def prepare_process() -> None:
    """Register the platform and arm the two repairs that verl needs on a CPU. Patches no verl file."""
    install_finder()
    wrapt.register_post_import_hook(_single_backend, "verl.utils.distributed")
