"""verl's training worker for several updates to a weight sync, which puts the step's first weights by.

For every update verl's `separate_async` trainer computes the old log-probs with the weights of the step's start. It
keeps those with `.detach().cpu()`, which copies nothing where the parameters lie on a CPU already: on a machine without
accelerators, and with `param_offload`. Restoring would then change nothing, without a word.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from verl.experimental.separation.engine_workers import DetachActorWorker


class KeepingActorWorker(DetachActorWorker):
    """Puts weights by as copies of their own, wherever they lie."""

    @property
    def copy_handler(self) -> Callable[[torch.nn.Module], Any]:
        keep = super().copy_handler
        return lambda module: own_copies(keep(module), module)


def own_copies(kept: Any, module: torch.nn.Module) -> Any:
    """Clone what shares its memory with a parameter of the module, in any nesting of tuples and dictionaries."""
    live = {_address(parameter.detach()) for parameter in module.parameters()}
    return tree_map_only(torch.Tensor, lambda tensor: tensor.clone() if _address(tensor) in live else tensor, kept)


def _address(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()
