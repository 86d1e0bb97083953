"""verl's platform interface for a machine without an accelerator."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class _CpuDeviceModule:
    """Takes the place of `torch.cuda`: torch.cpu, with harmless answers where torch.cpu has none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def mem_get_info(self, *_: object) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def _zero(self, *_: object, **__: object) -> int:
        return 0

    memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = _zero

    def _nothing(self, *_: object, **__: object) -> None:
        return None

    empty_cache = ipc_collect = reset_peak_memory_stats = manual_seed = manual_seed_all = set_device = _nothing
    set_rng_state = _nothing

    def get_rng_state(self, *_: object) -> torch.Tensor:
        return torch.get_rng_state()

    def get_device_name(self, *_: object) -> str:
        return "cpu"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Presents the CPU as one device, which Ray counts as one `GPU`."""

    device_name = "cpu"  # pyright: ignore[reportAssignmentType]
    vendor_name = "cpu"  # pyright: ignore[reportAssignmentType]

    @property
    def device_module(self) -> ModuleType:
        return cast(ModuleType, _CpuDeviceModule())

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # chosen by VERL_PLATFORM only; verl's own search must never find it

    def current_device(self) -> int:
        # torch takes an int for the index of an accelerator.
        return cast(int, torch.device("cpu"))

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False  # weights travel through shared memory

    def cudart(self) -> None:
        return None
