"""Refuse configs that past versions as LoRA adapters (`snapshot.placement=shared`) cannot honour."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recipe.soup.errors import refuse
from recipe.soup.names import TRAINER_MODE
from recipe.soup.settings import POLICIES, SnapshotSettings
from verl_ext.historical_policy.snapshots import ADAPTER_FILES, missing_file

SETTINGS = "algorithm.soup.snapshot"
MODEL = "actor_rollout_ref.model"
OWN_ENGINE = ("n_gpus", "gpu_memory_utilization", "max_num_seqs")


def sends_adapters(config: DictConfig) -> bool:
    """Whether LoRA adapters are trained, and reach the engine as such."""
    model = config.actor_rollout_ref.model
    lora = model.get("lora") or {}
    return bool(model.get("lora_rank", 0) or lora.get("rank", 0)) and not lora.get("merge", False)


def check_adapters(config: DictConfig, settings: SnapshotSettings) -> None:
    """Check what `snapshot.placement=shared` needs of the composed config.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    model, mode = config.actor_rollout_ref.model, config.trainer.v1.trainer_mode
    rank = model.get("lora_rank", 0)
    if not rank:
        why = "past versions in the current policy's engine are LoRA adapters; train some (8 and up), or use colocated"
        raise refuse(f"{MODEL}.lora_rank", rank, f"{why} for {SETTINGS}.placement.")
    if not sends_adapters(config):
        why = "merged adapters reach the engine as whole weights; set it to False, or use colocated"
        raise refuse(f"{MODEL}.lora.merge", True, f"{why} for {SETTINGS}.placement.")
    if (kind := (model.get("lora") or {}).get("type", "lora")) != "lora":
        raise refuse(f"{MODEL}.lora.type", kind, "an engine takes plain LoRA beside other adapters; set it to lora.")
    if parameters := model.get("target_parameters"):
        why = "adapters of anything but linear layers have not been tried with placement=shared; leave it null."
        raise refuse(f"{MODEL}.target_parameters", parameters, why)
    if mode != TRAINER_MODE:
        why = "with partial rollouts the current adapter is replaced while past ones sample; use"
        raise refuse("trainer.v1.trainer_mode", mode, f"{why} {TRAINER_MODE}.")
    for key in OWN_ENGINE:
        if (value := getattr(settings, key)) is not None:
            raise refuse(f"{SETTINGS}.{key}", value, "with placement=shared there is no second engine; leave it null.")
    if settings.policy not in POLICIES:
        _check_foreign(f"{SETTINGS}.policy", settings.policy, str(model.path), rank)


def _check_foreign(key: str, path: str, base: str, rank: int) -> None:
    """Another run's adapter must be plain LoRA on the same base model, of a rank that the engine has room for."""
    folder = Path(path).expanduser()
    if (missing := missing_file(folder)) is not None:
        choices = ", ".join(POLICIES)
        raise refuse(key, path, f"{missing} is missing; choose one of {choices}, or give the folder of an adapter.")
    try:
        adapter: dict[str, Any] = json.loads((folder / ADAPTER_FILES[0]).read_text())
    except ValueError:
        raise refuse(key, path, f"its {ADAPTER_FILES[0]} is no JSON; give another folder.") from None
    other = adapter.get("base_model_name_or_path")
    if other is not None and _place(str(other)) != _place(base):
        why = f"it belongs to the base model {other}, and this run has {base}; if they are the same, write so into its"
        raise refuse(key, path, f"{why} {ADAPTER_FILES[0]}.")
    for name, plain in (("peft_type", "LORA"), ("use_dora", False), ("modules_to_save", None)):
        if (value := adapter.get(name)) not in (plain, None):
            raise refuse(key, path, f"its {name} is {value}, and only plain LoRA is supported; give another adapter.")
    if int(adapter.get("r") or 0) > rank:
        why = f"its rank is {adapter['r']}, and the engine has room for {MODEL}.lora_rank={rank}; raise that"
        raise refuse(key, path, f"{why}, or give another adapter.")


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
