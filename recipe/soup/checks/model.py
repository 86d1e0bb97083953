"""Refuse a model that is not there, or that lacks a part which verl needs, under `algorithm=soup`, `grpo` and `verl`.

Looks at files only; what loads them is `soup-verl doctor`.
"""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import first_line, refuse

MODEL = "actor_rollout_ref.model"
KEY = f"{MODEL}.path"
ROLLOUT = "actor_rollout_ref.rollout"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
OTHER_TEMPLATES = ("tekken.json", "tokenization_*.py")
"""Files of tokenizers that bring a chat template in code of their own."""


def check_model(config: DictConfig) -> None:
    """Check model folder, weights, chat template and positions, as far as they are on this machine.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    check_place(config)
    model = config.actor_rollout_ref.model
    folder = model_folder(str(model.path))
    if folder is None:
        return
    known = _read_config(KEY, folder)
    _check_positions(config, known)
    _check_fused(config, known)
    if config.get("model_engine", "dp") == "dp":  # others may read checkpoints of their own
        _check_weights(KEY, str(model.path))
    if model.get("custom_chat_template"):
        return
    if model.get("tokenizer_path"):
        check_template(f"{MODEL}.tokenizer_path", str(model.tokenizer_path))
    else:
        check_template(KEY, str(model.path))


def check_folder(key: str, path: str, template: bool) -> None:
    """Check a model that is only to be sampled.

    Args:
        template: whether it must bring a chat template.

    Raises:
        SystemExit: its config cannot be read, or weights or chat template are missing.
    """
    if (folder := model_folder(path)) is not None:
        _read_config(key, folder)
        _check_weights(key, path)
        if template:
            check_template(key, path)


def check_place(config: DictConfig) -> None:
    """Check that there is such a folder, or such a name where the hub may not be asked.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    path = str(config.actor_rollout_ref.model.path)
    if "://" in path:
        return
    local = Path(path).expanduser()
    if local.is_file():
        raise refuse(KEY, path, f"is a file; give its folder, {local.parent}.")
    if local.exists():
        if not (local / "config.json").is_file() and not OmegaConf.select(config, f"{MODEL}.hf_config_path"):
            raise refuse(KEY, path, "has no config.json; give a folder in the form of Hugging Face's models.")
        return
    if path.startswith(("/", "~", ".")):
        raise refuse(KEY, path, "no such folder; give a model folder or the name of a model on the hub.")
    if path.count("/") > 1:  # no name on the hub has two
        raise refuse(
            KEY, path, f"no such folder in {Path.cwd()}; give a model folder or the name of a model on the hub."
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes")
    if offline and _cached(path, "config.json") is None:
        why = (
            "neither a folder nor in the local hub cache, and HF_HUB_OFFLINE (set by hardware=cpu too) forbids the hub"
        )
        raise refuse(KEY, path, f"{why}; download it first, or run with HF_HUB_OFFLINE=0.")


def model_folder(path: str) -> Path | None:
    """Return the folder of a model's files, in the hub's cache for a name; None if they are not on this machine."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    config = _cached(path, "config.json")
    return None if config is None else config.parent


def _cached(name: str, file: str) -> Path | None:
    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:  # another kind of address
        return None
    return Path(found) if isinstance(found, str) else None


def _read_config(key: str, path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():  # it is elsewhere: hf_config_path
        return {}
    try:
        read = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise refuse(key, path, f"its config.json cannot be read ({first_line(error)}); copy the model anew.") from None
    if not isinstance(read, dict):
        raise refuse(key, path, "its config.json is no config of a model; copy the model anew.")
    return read


def _check_weights(key: str, path: str) -> None:
    folder = Path(path).expanduser()  # of a model in the hub's cache, what is missing will be downloaded
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise refuse(key, path, "has a config.json but no weights (*.safetensors); copy or download them as well.")


def _check_positions(config: DictConfig, model: dict[str, Any]) -> None:
    """Check what verl's vLLM server asserts about the length of a sequence."""
    changed = OmegaConf.select(config, f"{MODEL}.override_config.max_position_embeddings")
    known = changed or model.get("max_position_embeddings")
    positions = known or (model.get("text_config") or {}).get("max_position_embeddings")
    rollout = config.actor_rollout_ref.rollout
    if not positions or rollout.name != "vllm":
        return
    longest, limit = rollout.prompt_length + rollout.response_length, rollout.max_model_len
    if limit is not None and limit > positions:
        why = f"the model's config.json has {positions} positions (max_position_embeddings)"
        raise refuse(f"{ROLLOUT}.max_model_len", limit, f"{why}; use at most that many, or null.")
    if longest > positions:
        why = f"with data.max_prompt_length={rollout.prompt_length} a sequence may have {longest} tokens, but the model"
        cure = f"has {positions} positions, so responses would be cut short; lower one of the two."
        raise refuse("data.max_response_length", rollout.response_length, f"{why} {cure}")


def _check_fused(config: DictConfig, model: dict[str, Any]) -> None:
    """Check that verl's fused loss finds the head's weight whole; it takes it past the head's own forward."""
    policy = config.actor_rollout_ref
    tied = OmegaConf.select(config, f"{MODEL}.override_config.tie_word_embeddings")
    if tied is None:
        tied = (model.get("text_config") or model).get("tie_word_embeddings")
    if policy.model.get("use_fused_kernels") and policy.actor.strategy == "fsdp2" and tied is False:
        why = "this model has a head of its own (tie_word_embeddings=false), whose weight fsdp2 keeps sharded meanwhile"
        cure = "set actor_rollout_ref.actor.strategy=fsdp, or leave the key out."
        raise refuse(f"{MODEL}.use_fused_kernels", True, f"{why}; {cure}")


def check_template(key: str, path: str) -> None:
    """Check that messages can become a prompt: verl asks the tokenizer's chat template, and has none of its own.

    Raises:
        SystemExit: the tokenizer has none.
    """
    place = model_folder(path)
    files = [] if place is None else [place / name for name in ("tokenizer_config.json", "processor_config.json")]
    if place is None or not files[0].is_file():
        return  # it comes from elsewhere; who loads it will see
    try:
        settings = [json.loads(file.read_text()) for file in files if file.is_file()]
    except (OSError, ValueError) as error:
        why = f"its tokenizer_config.json cannot be read ({first_line(error)}); copy the model anew."
        raise refuse(key, path, why) from None
    in_settings = any("chat_template" in found or "auto_map" in found for found in settings)
    in_files = any(place.glob("*chat_template*")) or any(any(place.glob(name)) for name in OTHER_TEMPLATES)
    if not in_settings and not in_files:
        why = "its tokenizer has no chat template, which makes prompts of messages; use an instruct model, or put a"
        raise refuse(key, path, f"{why} chat_template.jinja there (in verl also {MODEL}.custom_chat_template).")
