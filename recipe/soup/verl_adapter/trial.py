"""A run's model and data tried out by verl's own functions, without a run: tokenizer, prompts, reward."""

import asyncio
import inspect
import logging
import math
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import first_line, refuse

MODEL = "actor_rollout_ref.model"
ROWS = 64
"""Rows of each set that are tried."""
GRADED = 4
"""Of them, so many have a response graded."""


@dataclass
class Tried:
    """A set's first rows, with the number of tokens of each prompt."""

    rows: list[dict[str, Any]]
    lengths: list[int]


def verls_own_checks(config: DictConfig) -> None:
    """Call what verl calls before it starts Ray.

    Raises:
        SystemExit: verl's own words.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    try:
        with _quiet():
            validate_config(config, need_reference_policy(config), need_critic(config))
            omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    except Exception as error:  # whatever verl raises
        raise SystemExit(f"verl refuses this config: {_words(error)}.") from error


def load_tokenizer(config: DictConfig) -> tuple[Any, Any, str]:
    """Load tokenizer, processor and type of the model as verl's workers do.

    Raises:
        SystemExit: they cannot be loaded, or a response could never end.
    """
    from transformers import AutoConfig
    from verl.utils import hf_processor, hf_tokenizer
    from verl.utils.fs import copy_to_local

    model = config.actor_rollout_ref.model
    key, path = f"{MODEL}.path", str(model.path)
    trust = bool(model.get("trust_remote_code"))
    try:
        with _quiet():
            local = copy_to_local(str(model.get("tokenizer_path") or path))
            tokenizer = hf_tokenizer(local, trust_remote_code=trust)
            processor = hf_processor(local, trust_remote_code=trust)
            found = copy_to_local(str(model.get("hf_config_path") or path))
            kind = AutoConfig.from_pretrained(found, trust_remote_code=trust).model_type
    except Exception as error:  # whatever transformers raises
        raise refuse(
            key, path, f"its tokenizer or config cannot be loaded ({_words(error)}); mend the folder."
        ) from error
    if template := model.get("custom_chat_template"):
        (processor or tokenizer).chat_template = template
    if tokenizer.eos_token_id is None:
        raise refuse(key, path, "its tokenizer has no eos_token, so no response would end; set one in its folder.")
    return tokenizer, processor, kind


def try_prompts(config: DictConfig, loaded: tuple[Any, Any, str], name: str) -> Tried:
    """Make the prompts of a set's first rows, as verl's dataset and agent loops do.

    Args:
        config: verl's composed config.
        loaded: see `load_tokenizer`.
        name: train_files or val_files.

    Raises:
        SystemExit: the rows cannot be read, or no prompt be made of one.
    """
    from verl.trainer.ppo.utils import create_rl_dataset
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    tokenizer, processor, kind = loaded
    key, given = f"data.{name}", config.data[name]
    data = OmegaConf.merge(config.data, {"filter_overlong_prompts": False, "shuffle": False})
    number = -1
    try:
        with _quiet():
            dataset: Any = create_rl_dataset(
                given, data, tokenizer, processor, is_train=name == "train_files", max_samples=ROWS
            )
            builder = create_continuous_token_builder(
                tokenizer,
                hf_model_type=kind,
                chat_template_kwargs=config.data.get("apply_chat_template_kwargs", {}),
                processor=processor,
            )
            tried = Tried([], [])
            for number in range(len(dataset)):
                row = dataset[number]
                tried.rows.append(row)
                tried.lengths.append(len(builder.build_initial_tokens(list(row["raw_prompt"]))))
    except Exception as error:  # whatever a dataset or a template raises
        what = "its rows cannot be read" if number < 0 else f"no prompt can be made of its row {number}"
        raise refuse(key, given, f"{what} ({_words(error)}); mend the data, or the template.") from error
    return tried


def try_reward(config: DictConfig, rows: Iterable[dict[str, Any]]) -> list[float]:
    """Grade two answers to some rows, none and the ground truth's own text, as verl's reward manager does: by keyword.

    Returns:
        the scores.

    Raises:
        SystemExit: the function cannot be loaded or called, or a score is no finite number.
    """
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.reward_score import default_compute_score

    named = config.reward.custom_reward_function
    key, path = f"reward.custom_reward_function.{'name' if named.path else 'path'}", named.name if named.path else None
    try:
        with _quiet():
            function: Any = get_custom_reward_fn(config) or default_compute_score
    except Exception as error:  # whatever the user's module raises
        raise refuse(key, path, f"{named.path} cannot be loaded ({_words(error)}); mend it.") from error
    scores = []
    for number, row in enumerate(rows):
        truth = row["reward_model"]["ground_truth"]
        for text in ("", str(truth)):
            asked = {
                "data_source": row["data_source"],
                "solution_str": text,
                "ground_truth": truth,
                "extra_info": {**(row.get("extra_info") or {}), "num_turns": 2, "rollout_reward_scores": {}},
            }
            try:
                with _quiet():
                    result = function(**asked)
                    result = asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result
            except Exception as error:  # whatever the user's function raises
                why = f"raised on the response {text!r} to row {number} ({_words(error)}), and verl would lose it"
                raise refuse(key, path, f"{why}; give 0 to what it cannot read.") from error
            scores.append(_score(key, path, result))
    return scores


async def _awaited(result: Any) -> Any:
    return await result


def _score(key: str, path: object, result: Any) -> float:
    score: Any = result.get("score") if isinstance(result, dict) else result
    try:
        value = float(score)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise refuse(key, path, f"gave {result!r}; return a finite number, or a dictionary with one under `score`.")
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what verl and transformers print and log while they load."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


def _words(error: BaseException) -> str:
    """Type and first line of the error that it began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = first_line(error).rstrip(".")
    if not str(error).strip():
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{frame.line or frame.name}"
    return f"{type(error).__name__}: {words}"
