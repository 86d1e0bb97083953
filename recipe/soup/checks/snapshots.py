"""Refuse configs that `source=snapshot` cannot honour, at start, by key and value."""

from pathlib import Path

from omegaconf import DictConfig

from recipe.soup.checks.adapters import check_adapters, sends_adapters
from recipe.soup.checks.snapshot_memory import check_memory
from recipe.soup.errors import refuse
from recipe.soup.settings import POLICIES, SnapshotSettings, parse_settings
from verl_ext.historical_policy.snapshots import checkpoint_files

SETTINGS = "algorithm.soup.snapshot"


def check_snapshots(config: DictConfig, settings: SnapshotSettings) -> None:
    """Check what `source=snapshot` needs of the composed config.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    model = config.actor_rollout_ref.model
    if settings.placement == "shared":
        check_adapters(config, settings)
    elif sends_adapters(config):
        key = "actor_rollout_ref.model.lora.merge"
        why = "a snapshot holds whole weights, so adapters must be merged; set it to True, or keep adapters alone by"
        raise refuse(key, False, f"{why} {SETTINGS}.placement=shared.")
    if model.get("lora_adapter_path"):
        key = "actor_rollout_ref.model.lora_adapter_path"
        raise refuse(
            key, model.lora_adapter_path, "version 0 must be the model itself; merge the adapter into it first."
        )
    if settings.policy == "best" and config.trainer.test_freq <= 0:
        key = "trainer.test_freq"
        raise refuse(key, config.trainer.test_freq, "snapshot.policy=best needs validations; set how often, in steps.")
    _check_weights("actor_rollout_ref.model.path", str(model.path))
    if settings.placement == "shared":
        return
    if settings.policy not in POLICIES:
        key, path = f"{SETTINGS}.policy", settings.policy
        if not Path(path).expanduser().exists() and (path.startswith(("/", "~", ".")) or "/" not in path):
            choices = ", ".join(POLICIES)
            raise refuse(key, path, f"no such folder; choose one of {choices}, or give a checkpoint or owner/model.")
        _check_weights(key, path)
    _check_gpus(config, settings)
    check_memory(config, settings)


def _check_weights(key: str, path: str) -> None:
    """Look at weights that are on this machine; for others the hub is asked later, where they are loaded."""
    if Path(path).expanduser().exists():
        try:
            checkpoint_files(path)
        except FileNotFoundError as error:
            raise refuse(key, path, str(error)) from None


def standalone_gpus(config: DictConfig) -> int:
    """Return the GPUs that the historical policy's own engine takes beside the trainer's; 0 if there is none."""
    given = config.algorithm.get("soup")
    if given is None:
        return 0
    settings = parse_settings(given, config.actor_rollout_ref.rollout.response_length)
    if not settings.mixes or settings.source != "snapshot" or settings.snapshot.placement != "standalone":
        return 0
    return settings.snapshot.n_gpus or _replica_gpus(config)


def _replica_gpus(config: DictConfig) -> int:
    rollout = config.actor_rollout_ref.rollout
    return rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size


def _check_gpus(config: DictConfig, settings: SnapshotSettings) -> None:
    size, n_gpus = _replica_gpus(config), settings.n_gpus
    if settings.placement == "colocated" and n_gpus is not None:
        raise refuse(f"{SETTINGS}.n_gpus", n_gpus, "colocated replicas use all the trainer's GPUs; leave it null.")
    if n_gpus is not None and (n_gpus < 1 or n_gpus % size):
        raise refuse(f"{SETTINGS}.n_gpus", n_gpus, f"one rollout replica has {size} GPUs; give a multiple of that.")
