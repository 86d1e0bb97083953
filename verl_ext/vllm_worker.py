"""verl's vLLM worker extension: a handshake, an exit where verl would hang, and whether new weights arrived."""

import os
import traceback
from typing import Any

import torch
from verl.utils.device import get_device_name
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from verl_ext import __version__
from verl_ext.weight_arrivals import Arrivals


class WorkerExtension(vLLMColocateWorkerExtension):
    """Runs inside each vLLM worker process; `rollout.engine_kwargs.vllm.worker_extension_cls` names it."""

    _arrivals: Arrivals

    def __new__(cls, **kwargs: Any) -> "WorkerExtension":
        if get_device_name() == "cpu":
            from vllm import _custom_ops

            # oneDNN packs a linear layer's weights and drops the originals, which then can't be updated.
            _custom_ops._supports_onednn = False
        instance = super().__new__(cls, **kwargs)
        instance._arrivals = Arrivals()
        return instance

    def verl_ext_handshake(self, version: str) -> None:
        """Prove that this worker runs our extension.

        Raises:
            RuntimeError: the driver runs another version of it.
        """
        if version != __version__:
            raise RuntimeError(f"verl_ext {__version__} in the vLLM worker, {version} in the driver: reinstall")

    def verl_ext_new_weights(self) -> None:
        """Answer whether other weights arrived since the last call than before it (`weight_arrivals.stale_weights`).

        Raises:
            RuntimeError: they did not.
        """
        stale = self._arrivals.settle()
        if stale is not None and self._is_last():
            raise RuntimeError(f"[stale weights: {stale}]")

    def _is_last(self) -> bool:
        """Whether vLLM reads this worker's answer after all others, which an error would leave for the next call."""
        worker: Any = self
        return worker.rank == worker.parallel_config.world_size - 1

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> None:
        self._arrivals.begin()
        try:
            super().update_weights_from_ipc(*args, **kwargs)
        except BaseException:
            # The sender waits for an answer that would never come. A dead worker is noticed, a silent one is not.
            traceback.print_exc()
            os._exit(1)

    def _update_weights(self, weights: list[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> None:
        if get_device_name() == "cpu":
            # On a CPU `.to(device)` copies nothing, and a view into the shared-memory buffer would outlive it.
            weights = [(name, tensor.clone()) for name, tensor in weights]
        self._arrivals.add(weights)
        super()._update_weights(weights, *args, **kwargs)
