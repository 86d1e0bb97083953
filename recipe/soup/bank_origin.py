"""What shaped the prefixes that a run keeps: stored with them, and compared when a run goes on with them."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.soup.run_settings import run_settings
from recipe.soup.settings import SoupSettings
from recipe.soup.settings.prefixes import PrefixSettings

SOURCE = f"{SoupSettings.path}.source"
NOTHING = "none"
"""The source of a run that mixes nothing."""
TRAIN_FILES = "data.train_files"
TOKENIZER = "actor_rollout_ref.model.tokenizer_path"
LOOP = "actor_rollout_ref.rollout.agent.default_agent_loop"
CALLS = "actor_rollout_ref.rollout.multi_turn.format"
TOOLS = "actor_rollout_ref.rollout.multi_turn.function_tool_path"
TOOL_FILES = (TOOLS, "actor_rollout_ref.rollout.multi_turn.tool_config_path")
NOT_ALWAYS_KNOWN = (TRAIN_FILES, TOKENIZER, TOOLS)
"""Their values are read off files, which the machine of the trainer or that of the checks may not have."""
OF_CONFIG = (
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.seed",
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.custom_chat_template",
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "data.seed",
    "data.shuffle",
    "data.train_max_samples",
    "data.apply_chat_template_kwargs",
    "trainer.total_training_steps",
    "trainer.total_epochs",
    LOOP,
    CALLS,
)
ENGINE = (
    "snapshot.storage",
    "snapshot.placement",
    "snapshot.n_gpus",
    "snapshot.gpu_memory_utilization",
    "snapshot.max_num_seqs",
)
"""Where past weights lie and run; the same prefixes come of it."""
BY_LAG = ("lag", "lag_distribution", "warm_start", "schedules.lag")
PLACEMENT = f"{SoupSettings.path}.snapshot.placement"
OWN_ENGINE = "colocated or standalone"
"""What a bank's origin says of a placement that keeps whole weights."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")


def bank_origin(config: DictConfig) -> dict[str, Any]:
    """Read all that shapes prefixes off a run's composed config: plain values by the names of their keys.

    Raises:
        SystemExit: see `run_settings`.
    """
    settings = run_settings(config)
    if not settings.mixes:
        return {SOURCE: NOTHING}
    if settings.source == "dataset":
        return {SOURCE: "dataset"}  # nothing is kept: each prompt brings its own
    origin = {f"{SoupSettings.path}.{name}": attrgetter(name)(settings) for name in _names(settings)}
    if settings.source == "snapshot":
        origin[PLACEMENT] = "shared" if settings.snapshot.placement == "shared" else OWN_ENGINE
    for key in OF_CONFIG:
        value = OmegaConf.select(config, key, default=None)
        origin[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    origin |= {TRAIN_FILES: _sizes(config.data.train_files), TOKENIZER: _tokenizer(config), TOOLS: _tools(config)}
    return origin


def _names(settings: SoupSettings) -> Iterator[str]:
    """The keys that say where prefixes come from, as far as these settings heed them."""
    without = ["resume_bank", "demonstrations", *ENGINE]
    without += [] if settings.source == "snapshot" else ["snapshot"]
    without += [] if settings.selection == "steered" else ["steering"]
    without += [] if settings.selection == "verified" else ["verification"]
    without += BY_LAG if settings.source == "replay" else []
    for name, _ in PrefixSettings.every_key():
        if not any(f"{name}.".startswith(f"{left_out}.") for left_out in without):
            yield name


def _sizes(named: Any) -> list[str] | None:
    """Sizes of files, which may move between two runs; None if one of them is not on this machine."""
    paths = [Path(str(name)).expanduser() for name in (named if OmegaConf.is_list(named) else [named])]
    return [f"{path.stat().st_size} bytes" for path in paths] if all(path.is_file() for path in paths) else None


def _tokenizer(config: DictConfig) -> str | None:
    """A digest of the tokenizer and its chat template; None if they are not in a folder on this machine."""
    model = config.actor_rollout_ref.model
    folder = Path(str(model.get("tokenizer_path") or model.path)).expanduser()
    parts = [(folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()]
    settings = folder / "tokenizer_config.json"  # which may hold the template, beside names of versions
    with suppress(OSError, ValueError, AttributeError):
        parts.append(json.dumps(json.loads(settings.read_text()).get("chat_template")).encode())
    return _digest(parts)


def _tools(config: DictConfig) -> str | None:
    """A digest of the files with tools; None if there are none on this machine."""
    named = [OmegaConf.select(config, key, default=None) for key in TOOL_FILES]
    paths = [Path(str(name)).expanduser() for name in named if name is not None]
    return _digest([path.read_bytes() for path in paths if path.is_file()])


def _digest(parts: list[bytes]) -> str | None:
    digest = hashlib.blake2b(b"".join(parts), digest_size=6)
    return f"digest {digest.hexdigest()}" if parts else None
