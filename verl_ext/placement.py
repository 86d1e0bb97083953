"""What verl and TransferQueue ask Ray for, and whether there is as much: where there is not, verl waits for ever.

verl reserves three CPUs with each GPU of a pool, and each process of TransferQueue keeps one. Every other actor
(trainer, agent loops, reward workers, vLLM servers) asks for none, and Ray places it also where none is free.
"""

import os
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

CPUS_WITH_GPU = 3
"""`ResourcePoolManager.max_colocate_count`."""
CPUS_WITH_STANDALONE_GPU = 2
"""The same of a replica with a pool of its own."""
SEPARATE = "separate_async"
"""End of the names of trainer modes whose rollout engines have GPUs of their own."""
UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
RAY_INIT = "ray_kwargs.ray_init"


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs, as Ray counts them."""

    cpus: float
    gpus: float


def asked_for(config: DictConfig, standalone_gpus: int = 0) -> Resources:
    """Return what a run asks Ray for.

    Args:
        config: verl's composed config.
        standalone_gpus: GPUs of replicas that a recipe starts with pools of their own.
    """
    pools = [(config.trainer.nnodes, config.trainer.n_gpus_per_node)]
    for key, enabled in (("reward.reward_model", "enable_resource_pool"), ("distillation", "enabled")):
        pool = OmegaConf.select(config, key)
        if pool is not None and pool.get(enabled):
            pools.append((pool.nnodes, pool.n_gpus_per_node))
    gpus = sum(nodes * per_node for nodes, per_node in pools)
    standalone_gpus += rollout_gpus(config)
    cpus = gpus * CPUS_WITH_GPU + standalone_gpus * CPUS_WITH_STANDALONE_GPU
    units = OmegaConf.select(config, UNITS, default=0) if _keeps_units(config) else 0
    queue = 1 + units if config.trainer.use_v1 else 0  # verl's older trainer has none
    return Resources(cpus + queue, gpus + standalone_gpus)


def is_separate(config: DictConfig) -> bool:
    """Whether the trainer is verl's `separate_async`, or made from it."""
    return bool(config.trainer.use_v1) and str(config.trainer.v1.trainer_mode).endswith(SEPARATE)


def rollout_gpus(config: DictConfig) -> int:
    """Return the GPUs of rollout engines apart from the trainer."""
    rollout = config.actor_rollout_ref.rollout
    return rollout.nnodes * rollout.n_gpus_per_node if is_separate(config) else 0


def _keeps_units(config: DictConfig) -> bool:
    return OmegaConf.select(config, "transfer_queue.backend.storage_backend") == "SimpleStorage"


def cluster_address(config: DictConfig) -> str | None:
    """Return the address of the Ray that the run will join; None if it starts one of its own."""
    address = OmegaConf.select(config, f"{RAY_INIT}.address") or os.environ.get("RAY_ADDRESS")
    if address is None:
        from ray._private.utils import read_ray_address

        address = read_ray_address()  # of a `ray start` on this machine
    return None if address in (None, "", "local") else str(address)


def here(config: DictConfig) -> Resources | None:
    """Return what a Ray that starts on this machine will count; None where that is not known before it does."""
    given = OmegaConf.select(config, RAY_INIT, default={})
    cpus, gpus = given.get("num_cpus"), given.get("num_gpus")
    try:
        if cpus is None:
            from ray._private.utils import get_num_cpus

            cpus = get_num_cpus(override_docker_cpu_warning=True)
        gpus = gpus_here(config.trainer.device) if gpus is None else gpus
    except (ImportError, AttributeError):  # another Ray counts elsewhere
        return None
    return None if gpus is None else Resources(float(cpus), float(gpus))


def gpus_here(device: str) -> int | None:
    """Return the GPUs that a Ray on this machine finds, of those that are visible; None for other accelerators."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    if device != "cuda":
        return None
    manager: Any = get_accelerator_manager_for_resource("GPU")
    visible = manager.get_current_process_visible_accelerator_ids()
    count = manager.get_current_node_num_accelerators()
    return count if visible is None else min(count, len(visible))


def check_placement(config: DictConfig, standalone_gpus: int = 0) -> None:
    """Refuse a run whose own Ray has fewer CPUs or GPUs than are asked for; one at an address is not asked.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    if cluster_address(config) is not None:
        return
    there = here(config)
    if there is not None:
        compare(config, asked_for(config, standalone_gpus), there, "this machine has")


def compare(config: DictConfig, asked: Resources, there: Resources, where: str) -> None:
    """Refuse a run that asks for more than there is.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    if there.gpus < asked.gpus:
        why = f"a run of {asked.gpus:g} GPUs in all, but {where} {there.gpus:g}"
        cure = "use as many as there are, or hardware=cpu on a machine without"
        raise SystemExit(f"trainer.n_gpus_per_node={config.trainer.n_gpus_per_node}: {why}; {cure}.")
    if there.cpus < asked.cpus:
        units = OmegaConf.select(config, UNITS, default=0)
        why = f"verl reserves {asked.cpus:g} CPUs in all, but {where} {there.cpus:g}, and it would wait for ever"
        cure = f"lower {UNITS}={units}" if units > 1 and _keeps_units(config) else "use fewer GPUs"
        given = OmegaConf.select(config, f"{RAY_INIT}.num_cpus")
        slots = f"{RAY_INIT}.num_cpus={asked.cpus:g} counts slots, not cores"
        raise SystemExit(f"{RAY_INIT}.num_cpus={given}: {why}; {slots}, or {cure}.")
