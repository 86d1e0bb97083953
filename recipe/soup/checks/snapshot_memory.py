"""Compute the historical engine's share of a GPU, and refuse what cannot fit there at once.

vLLM gives each engine `gpu_memory_utilization` of the whole GPU for weights, KV cache and activations, whatever else
is there: so much must be free at start, and weights and KV cache are mapped again at each wake-up. Two colocated
engines sleep in turn, but a sleeping one keeps its CUDA context and graphs, and the trainer's weights and optimizer
stay (unless they are offloaded).
"""

import shutil
import subprocess
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from omegaconf import DictConfig
from safetensors import safe_open

from recipe.soup.errors import refuse
from recipe.soup.settings import SnapshotSettings
from verl_ext.historical_policy.snapshots import checkpoint_files

GB = 1e9
COLOCATED_SHARE = 0.9
"""Part of the rollout's share that the engine gets: the rollout's engine keeps some of its own while it sleeps."""
ASLEEP = 2 * GB
"""Bytes that a sleeping engine keeps: CUDA context and graphs. An assumption, and rather too low than too high."""
KEY = "algorithm.soup.snapshot.gpu_memory_utilization"
ROLLOUT_KEY = "actor_rollout_ref.rollout.gpu_memory_utilization"


def engine_overrides(config: DictConfig, settings: SnapshotSettings) -> dict[str, Any]:
    """Return the keys of `actor_rollout_ref.rollout` in which the historical engine differs from the rollout's."""
    rollout, share = config.actor_rollout_ref.rollout, settings.gpu_memory_utilization
    if share is None:
        share = rollout.gpu_memory_utilization * (COLOCATED_SHARE if settings.placement == "colocated" else 1)
    return {"gpu_memory_utilization": share, "max_num_seqs": settings.max_num_seqs or rollout.max_num_seqs}


def check_memory(config: DictConfig, settings: SnapshotSettings) -> None:
    """Check that a GPU has room for all that it must hold at once.

    Where GPU or model are not known, vLLM's own check at start must do.

    Raises:
        SystemExit: it does not fit; the sentence has the sum.
    """
    if config.trainer.device == "cpu":  # the environment sets the size of the KV cache
        return
    rollout = config.actor_rollout_ref.rollout
    share: float = engine_overrides(config, settings)["gpu_memory_utilization"]
    colocated, awake = settings.placement == "colocated", rollout.gpu_memory_utilization
    if colocated and not rollout.free_cache_engine and share + awake > 1:
        both = f"nothing sleeps (free_cache_engine=False), and {share:.2f} + {awake:.2f} for the rollout engine"
        raise refuse(KEY, f"{share:g}", f"{both} = {share + awake:.2f} of a GPU; lower it, or let engines sleep.")
    total, params = gpu_bytes(), parameters(str(config.actor_rollout_ref.model.path))
    if total is None or params is None:
        return
    if not rollout.get("quantization"):
        weights = engine_bytes(config, params)
        if weights >= share * total:
            room = f"{share:.2f} x {total / GB:.0f} GB = {share * total / GB:.1f} GB"
            why = f"the weights alone have {weights / GB:.1f} GB, of {room}; raise it, or tensor_model_parallel_size."
            raise refuse(KEY, f"{share:g}", why)
    if not colocated:
        return
    trainer = trainer_bytes(config, params)
    beside = f"{trainer / GB:.1f} GB of weights and optimizer in the trainer"
    if rollout.free_cache_engine:
        held, beside = trainer + ASLEEP, f"{beside} + {ASLEEP / GB:.0f} GB of the engine that sleeps"
    else:
        held, beside = trainer + awake * total, f"{beside} + {awake:.2f} x {total / GB:.0f} GB of the rollout engine"
    # Engines that sleep take turns, so each has a sum; without sleep the first sum has both.
    for key, value in ((KEY, share), (ROLLOUT_KEY, awake))[: 2 if rollout.free_cache_engine else 1]:
        needed = value * total + held
        if needed > total:
            why = f"{value:.2f} x {total / GB:.0f} GB + {beside} = {needed / GB:.1f} GB on a GPU of {total / GB:.0f} GB"
            raise refuse(key, f"{value:g}", f"{why}; lower it, offload the trainer, or use placement=standalone.")


def trainer_bytes(config: DictConfig, params: float) -> float:
    """Return the bytes that FSDP keeps on each GPU while an engine samples: weights and Adam's moments; else 0."""
    actor = config.actor_rollout_ref.actor
    if actor.strategy not in ("fsdp", "fsdp2"):
        return 0.0
    fsdp = actor.fsdp_config
    gpus = config.trainer.n_gpus_per_node * config.trainer.nnodes
    width = 4 if str(fsdp.get("model_dtype") or "fp32") in ("fp32", "float32") else 2
    adapters = trains_adapters(config)
    away = bool(fsdp.get("offload_policy"))
    copies = (not (away or fsdp.param_offload)) + 2 * (not (away or fsdp.optimizer_offload or adapters))
    return width * copies * params / (fsdp.fsdp_size if 0 < fsdp.fsdp_size < gpus else gpus)


def trains_adapters(config: DictConfig) -> bool:
    """Whether only LoRA's adapters are trained, so that the optimizer holds next to nothing."""
    model = config.actor_rollout_ref.model
    return bool(model.get("lora_rank", 0) or (model.get("lora") or {}).get("rank", 0))


def engine_bytes(config: DictConfig, params: float) -> float:
    """Return the bytes of a rollout engine's weights on each of its GPUs."""
    rollout = config.actor_rollout_ref.rollout
    return params * (4 if rollout.dtype == "float32" else 2) / rollout.tensor_model_parallel_size


def gpu_bytes() -> float | None:
    """Return the memory of this machine's smallest GPU in bytes, without a CUDA context; None if there is no GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    sizes = [int(line) * 2**20 for line in lines if line.isdigit()]
    return min(sizes) if sizes else None


def parameters(path: str) -> int | None:
    """Count the parameters of a model from its safetensors; None if they are not on this machine."""
    folder = Path(path).expanduser()
    if not folder.exists():
        try:
            cached = try_to_load_from_cache(path, "config.json")
        except HFValidationError:  # another kind of address
            return None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    count = 0
    try:
        for file in checkpoint_files(str(folder)):
            with safe_open(file, "pt") as tensors:
                count += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except FileNotFoundError:
        return None
    return count
