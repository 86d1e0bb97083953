"""Past versions as LoRA adapters in the current policy's own engine: what the trainer's side does.

verl gives vLLM room for one adapter and sends no other. Here the engine gets room for more (`adapter_server.py`), and
each version that is kept is a folder of PEFT's.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from omegaconf import DictConfig, open_dict
from safetensors.torch import load_file, save_file
from verl.workers.rollout.replica import RolloutReplicaRegistry

from verl_ext.historical_policy.snapshots import ADAPTER_FILES, Snapshot


def use_adapters(config: DictConfig, at_once: int) -> None:
    """Give this run's rollout engines room for past adapters. Call it before they are created, in their process.

    Args:
        config: verl's whole config; changed in place.
        at_once: different past adapters that may be asked for at the same time, beside the current one. The engine has
            a slot for each on the device: two matrices for each linear layer.
    """
    engines = config.actor_rollout_ref.rollout.engine_kwargs
    given = engines.get("vllm") or {}
    slots = max(given.get("max_loras") or 0, at_once + 1)
    kept = max(given.get("max_cpu_loras") or 0, slots + 1)
    with open_dict(config):
        # verl's server overwrites the first one with 1; ours puts it back.
        engines.vllm = {**given, "max_loras": slots, "max_cpu_loras": kept}
    RolloutReplicaRegistry.register("vllm", _adapter_replica)


def _adapter_replica() -> Any:
    from verl_ext.historical_policy.adapter_server import AdapterReplica

    return AdapterReplica


def take_adapter(workers: Sequence[Any], version: int, folder: Path) -> Snapshot:
    """Write the adapters that are trained now.

    Args:
        workers: verl's training workers (Ray actors), all of them, since each gathers its part of every tensor.
        version: number of updates that made the adapters.
        folder: readable by every node; gets a folder for the version.
    """
    target = folder / f"version_{version}"
    ray.get([worker.__ray_call__.remote(partial(_write, folder=target)) for worker in workers])
    return Snapshot(version, files := tuple(target / name for name in ADAPTER_FILES), sum(map(_size, files)))


def take_zero_adapter(workers: Sequence[Any], folder: Path) -> Snapshot:
    """Write adapters of the same shapes that change nothing: the base model, as version 0.

    Without an adapter, vLLM's CPU kernels give the base model's tokens the last slot's adapter (vLLM 0.28).
    """
    taken = take_adapter(workers, 0, folder)
    _, weights = taken.shards
    assert isinstance(weights, Path)
    _replace(weights, {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()})
    return Snapshot(0, (), taken.nbytes, origin=str(weights.parent))


def _size(file: Path) -> int:
    return file.stat().st_size


def _write(actor: Any, folder: Path) -> None:
    """Run in a training worker: gather the adapters, and write them on the first one."""
    from peft import LoraConfig

    [worker] = [worker for worker in actor.worker_dict.values() if hasattr(worker, "actor")]
    gathered, config = worker.actor.engine.get_per_tensor_param(
        layered_summon=worker.layered_summon, base_sync_done=True
    )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in gathered}
    if torch.distributed.get_rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings, weights = (folder / name for name in ADAPTER_FILES)
    settings.unlink(missing_ok=True)
    LoraConfig.from_peft_type(**config).save_pretrained(str(folder))
    _replace(weights, tensors)


def _replace(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    file.unlink(missing_ok=True)  # a checkpoint may hold a link to an older file of this name
    save_file(tensors, file)
