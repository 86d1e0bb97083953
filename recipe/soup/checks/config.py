"""Refuse every config that SOUP cannot honour, at start, by key and value.

Each check raises a SystemExit with one sentence: Hydra would swallow any other exception from its callback.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as parquet
from huggingface_hub import try_to_load_from_cache
from omegaconf import DictConfig, ListConfig, OmegaConf

from recipe.soup.checks.losses import check_loss, check_partial_rollouts
from recipe.soup.checks.snapshots import check_snapshots
from recipe.soup.errors import first_line, refuse
from recipe.soup.names import AGENT_NAME, ASYNC_TRAINER_MODE, TRAINER_MODE
from recipe.soup.prefixes.snapshot import SNAPSHOT_FOLDER
from recipe.soup.prefixes.source import BANK_FILE, read_source
from recipe.soup.run_settings import run_settings
from verl_ext.historical_policy.store import INDEX_FILE

ROLLOUT = "actor_rollout_ref.rollout"


def check_config(config: DictConfig) -> None:
    """Check the composed config of a run with `algorithm=soup`.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    settings = run_settings(config)
    for key, allowed, why in RULES:
        value = OmegaConf.select(config, key, default=allowed[0])
        if value not in allowed:
            raise refuse(key, value, f"{why}; set it to {allowed[0]}.")
    temperature = config.actor_rollout_ref.rollout.temperature
    if temperature <= 0:
        raise refuse(f"{ROLLOUT}.temperature", temperature, "greedy tokens have no sampling probability; use 1.0.")
    per_prefix, n = settings.samples_per_prefix, config.actor_rollout_ref.rollout.n
    if n % per_prefix:
        why = f"rollout.n={n} samples cannot be shared out evenly; use a divisor of it."
        raise refuse("algorithm.soup.samples_per_prefix", per_prefix, why)
    if settings.mixes:
        check_loss(config, settings)
        if config.trainer.v1.trainer_mode == ASYNC_TRAINER_MODE:
            check_partial_rollouts(settings)
    _check_model(config)
    _check_data(config)
    if settings.mixes and settings.source == "snapshot":
        check_snapshots(config, settings.snapshot)
    if settings.mixes:
        _check_resume(config, settings.source)


_BIASED = "log-probs are recorded for the full distribution at the rollout's temperature, so this biases every ratio"
_FROM_DISK = "samples of another run were not sampled by the policies of this one"
_TEMPERATURE = "ratios need log-probs at the rollout's temperature"
RULES: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("trainer.use_v1", (True,), "SOUP extends verl's v1 trainer"),
    ("trainer.v1.trainer_mode", (TRAINER_MODE, ASYNC_TRAINER_MODE), "SOUP has trainers of its own"),
    (f"{ROLLOUT}.name", ("vllm",), "only vLLM is supported yet"),
    (f"{ROLLOUT}.top_p", (1.0,), _BIASED),
    (f"{ROLLOUT}.top_k", (-1, 0), _BIASED),
    (f"{ROLLOUT}.min_p", (0.0, None), _BIASED),
    (f"{ROLLOUT}.repetition_penalty", (1.0, None), _BIASED),
    (f"{ROLLOUT}.logprobs_mode", ("processed_logprobs",), _TEMPERATURE),
    (f"{ROLLOUT}.engine_kwargs.vllm.logprobs_mode", ("processed_logprobs",), _TEMPERATURE),
    (f"{ROLLOUT}.calculate_log_probs", (True,), "ratios need the log-probs of the policy that sampled each token"),
    (f"{ROLLOUT}.agent.default_agent_loop", (AGENT_NAME,), "tool and custom agent loops are not supported yet"),
    (f"{ROLLOUT}.enable_rollout_routing_replay", (False,), "a complete prefix has no routing to replay"),
    (f"{ROLLOUT}.multi_turn.enable", (False,), "several turns are not supported yet"),
    (f"{ROLLOUT}.disaggregation.enabled", (False,), "prefixes have not been tried with prefill and decode apart"),
    ("model_engine", ("dp",), "SOUP's loss has been tried with FSDP only"),
    ("skip.rollout.enable", (False,), _FROM_DISK),
    ("skip.rollout_tq.enable", (False,), _FROM_DISK),
    ("skip.async_rollout.enable", (False,), _FROM_DISK),
    ("trainer.v1.sync.parameter_sync_step", (1,), "a version is one update"),
    ("trainer.v1.colocate_async.parameter_sync_step", (1,), "a version is one update"),
    ("distillation.enabled", (False,), "its loss and SOUP's are not combined yet"),
    ("algorithm.use_kl_in_reward", (False,), "the penalty would be taken at the historical policy; use a KL loss"),
    ("data.tool_config_path", (None,), "tools are not supported yet"),
    ("data.function_tool_path", (None,), "tools are not supported yet"),
)
"""Key, allowed values (the first is the one to set), and why others are refused. A missing key is allowed."""


_COLUMNS = {
    "agent_name": "would bypass SOUP's agent loop",
    "__do_sample__": "would make samples greedy, which have no sampling probability",
    "__rollout_n__": "would change the number of samples that prefixes are planned for",
}


def _check_model(config: DictConfig) -> None:
    key, path = "actor_rollout_ref.model.path", str(config.actor_rollout_ref.model.path)
    if os.path.exists(os.path.expanduser(path)) or "://" in path:
        return
    if path.startswith(("/", "~", ".")):
        raise refuse(key, path, "no such folder; give a model folder or the name of a model on the hub.")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes")
    if offline and not isinstance(try_to_load_from_cache(path, "config.json"), str):
        why = (
            "neither a folder nor in the local hub cache, and HF_HUB_OFFLINE (set by hardware=cpu too) forbids the hub"
        )
        raise refuse(key, path, f"{why}; download it first, or run with HF_HUB_OFFLINE=0.")


def _files(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list | tuple | ListConfig) else [value])]


def _columns(path: Path) -> list[str]:
    """Return the column names of a dataset in one of the formats that verl reads."""
    if path.suffix == ".parquet":
        return parquet.read_schema(path).names
    if path.suffix != ".jsonl":
        with suppress(ValueError):  # lines, in a file called .json
            return list(pd.read_json(path).columns)
    return list(pd.read_json(path, lines=True).columns)


def _check_data(config: DictConfig) -> None:
    if OmegaConf.select(config, "data.custom_cls.path") is not None:
        return  # a dataset class of the user's own knows what its files are
    for key, path in _local_files(config):
        if not path.exists():
            raise refuse(key, path, "no such file; give a parquet file with verl's columns.")
        try:
            columns = _columns(path)
        except (OSError, ValueError) as error:
            why = f"cannot be read as {path.suffix.removeprefix('.') or 'a dataset'} ({first_line(error)})"
            raise refuse(key, path, f"{why}; give a parquet file with verl's columns.") from None
        for column, effect in _COLUMNS.items():
            if column in columns:
                raise refuse(key, path, f"its column `{column}` {effect}; remove it from the dataset.")
        for media in ("image_key", "video_key", "audio_key"):
            name = config.data.get(media)
            if name in columns:
                raise refuse(f"data.{media}", name, f"{path} has this column; multimodal data is not supported yet.")


def _local_files(config: DictConfig) -> Iterator[tuple[str, Path]]:
    for key in ("train_files", "val_files"):
        for name in _files(config.data[key]):
            if "://" not in name:
                yield f"data.{key}", Path(name).expanduser()


def _check_resume(config: DictConfig, source: str) -> None:
    trainer = config.trainer
    if trainer.resume_mode == "resume_path":
        key, folder = "trainer.resume_from_path", Path(str(trainer.resume_from_path))
    elif trainer.resume_mode == "auto":
        key, root = "trainer.default_local_dir", Path(trainer.default_local_dir)
        tracker = root / "latest_checkpointed_iteration.txt"
        if not tracker.exists():
            return
        folder = root / f"global_step_{tracker.read_text().strip()}"
    else:
        return
    advice = "start anew with trainer.resume_mode=disable in a folder of its own."
    if trainer.v1.trainer_mode == ASYNC_TRAINER_MODE:
        lost = f"{folder} has a checkpoint, but with this trainer the prefixes of samples in flight are not in it"
        raise refuse("trainer.v1.trainer_mode", ASYNC_TRAINER_MODE, f"{lost}; {advice}")
    if not (folder / BANK_FILE).exists():
        lost = f"this checkpoint has no {BANK_FILE}, so SOUP did not write it and its prefixes are lost"
        raise refuse(key, folder, f"{lost}; resume a SOUP checkpoint, or {advice}")
    written_by = read_source(folder)
    if written_by != source:
        other = f"the checkpoint {folder} holds the prefixes of source={written_by}"
        raise refuse("algorithm.soup.source", source, f"{other}; go on with that, or {advice}")
    if source == "snapshot" and not (folder / SNAPSHOT_FOLDER / INDEX_FILE).exists():
        raise refuse(key, folder, f"this checkpoint has no {SNAPSHOT_FOLDER}, so past weights are lost; {advice}")
