"""Whether this machine, or the Ray cluster, has room for the run: CPUs, GPUs and their memory, shared memory."""

import logging
import os
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipe.soup.checks.snapshot_memory import GB, engine_bytes, gpu_bytes, parameters, trainer_bytes
from recipe.soup.checks.snapshots import standalone_gpus
from recipe.soup.errors import refuse
from verl_ext.placement import Resources, asked_for, cluster_address, compare, here

ROLLOUT = "actor_rollout_ref.rollout"
SHARED_MEMORY = Path("/dev/shm")


class CannotTell(Exception):
    """What is asked is not known here; the words say why."""


def check_resources(config: DictConfig) -> str:
    """Compare CPUs and GPUs that verl asks for with those of this machine, or of the Ray cluster that it will join.

    Raises:
        SystemExit: there are fewer.
        CannotTell: the cluster does not answer.
    """
    asked, address = asked_for(config, standalone_gpus(config)), cluster_address(config)
    if address is not None:
        compare(config, asked, _of_cluster(address), f"the Ray cluster at {address} has")
        return f"the Ray cluster at {address} has the {asked.cpus:g} CPUs and {asked.gpus:g} GPUs that verl asks for"
    there = here(config)
    if there is None:
        raise CannotTell(f"accelerators of trainer.device={config.trainer.device} are not counted here")
    compare(config, asked, there, "this machine has")
    has = f"its Ray will have {there.cpus:g} and {there.gpus:g}"
    return f"verl asks for {asked.cpus:g} CPUs and {asked.gpus:g} GPUs, and {has}"


def _of_cluster(address: str) -> Resources:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # whatever Ray raises
        raise CannotTell(f"the Ray cluster at {address} does not answer ({type(error).__name__})") from error
    try:
        total = ray.cluster_resources()
    finally:
        ray.shutdown()
    return Resources(total.get("CPU", 0), total.get("GPU", 0))


def check_gpu_memory(config: DictConfig) -> str:
    """Check that weights and optimizer, and vLLM's share beside them, fit on a GPU.

    Raises:
        SystemExit: they do not; the sentence has the sum.
        CannotTell: GPU or weights are not here.
    """
    if config.trainer.device == "cpu":
        return "there is none to fill: hardware=cpu"
    rollout, key = config.actor_rollout_ref.rollout, f"{ROLLOUT}.gpu_memory_utilization"
    total, count = gpu_bytes(), parameters(str(config.actor_rollout_ref.model.path))
    if total is None or count is None:
        raise CannotTell(f"{'no GPU' if total is None else 'no weights'} on this machine; ask on the one that will run")
    share = rollout.gpu_memory_utilization
    weights = engine_bytes(config, count)
    if weights >= share * total and not rollout.get("quantization"):
        room = f"{share:g} x {total / GB:.0f} GB"
        why = f"the weights alone have {weights / GB:.1f} GB on each GPU, of {room}"
        raise refuse(key, share, f"{why}; raise it, or {ROLLOUT}.tensor_model_parallel_size.")
    trainer = trainer_bytes(config, count)
    needed = f"{share:g} x {total / GB:.0f} GB of vLLM + {trainer / GB:.1f} GB of weights and optimizer in the trainer"
    if share * total + trainer > total:
        cure = "lower it, or set actor_rollout_ref.actor.fsdp_config.param_offload and optimizer_offload"
        raise refuse(key, share, f"{needed} are more than a GPU of {total / GB:.0f} GB; {cure}.")
    return f"{needed} fit on a GPU of {total / GB:.0f} GB"


def check_shared_memory(config: DictConfig) -> str:
    """Look whether Ray's object store fits into shared memory, in which NCCL and vLLM's processes meet as well.

    Raises:
        CannotTell: it does not; Ray then takes the disk, which is slow, and what NCCL needs depends on the GPUs.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free
    asked = OmegaConf.select(config, "ray_kwargs.ray_init.object_store_memory")
    if asked is None:
        from ray._common.utils import get_system_memory

        asked = min(0.3 * get_system_memory(), 200 * GB)  # Ray's default
    if cluster_address(config) is None and free < asked:
        store = f"{SHARED_MEMORY} has {free / GB:.1f} GB free, and Ray's object store wants {asked / GB:.1f} GB"
        raise CannotTell(f"{store}: it would lie on the disk, which is slow; raise --shm-size of the container")
    return f"{free / GB:.1f} GB are free in {SHARED_MEMORY}"


def check_memory(config: DictConfig) -> str:
    """Look at the memory that is free.

    Raises:
        CannotTell: it may not be enough.
    """
    from verl_ext.cpu.machine import memory_warning

    if warning := memory_warning():
        raise CannotTell(warning.rstrip("."))
    return f"{os.cpu_count()} cores, and memory for a small run"
