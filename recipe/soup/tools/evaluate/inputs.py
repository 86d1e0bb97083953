"""What is evaluated, read and checked before vLLM loads."""

import argparse
import math
from pathlib import Path
from typing import Any

from recipe.soup.checks.tables import FORMATS
from recipe.soup.errors import refuse
from recipe.soup.mathematics.datasets import DATASETS, load
from recipe.soup.records.problems import Problem
from recipe.soup.verl_adapter.compose import composed
from recipe.soup.verl_adapter.problems import Prompts, read_problems

KEYS = ("data.", "reward.", "actor_rollout_ref.model.")
"""verl's keys that decide how problems are read, asked and graded."""


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers with which there would be nothing to sample.

    Raises:
        SystemExit: one sentence.
    """
    for name in ("samples", "max_tokens", "gpus"):
        if getattr(args, name) < 1:
            raise refuse(f"--{name.replace('_', '-')}", getattr(args, name), "give 1 or more.")
    if not 0 < args.top_p <= 1:
        raise refuse("--top-p", args.top_p, "give a number above 0, at most 1.")
    if not 0 <= args.temperature < math.inf:
        raise refuse("--temperature", args.temperature, "give 0 or more.")
    if args.temperature == 0 and args.samples > 1:
        raise refuse("--samples", args.samples, "at temperature 0 all samples are equal; give --samples 1.")
    if args.limit == 0:
        raise refuse("--limit", args.limit, "no problem would be left; give 1 or more, or leave it out.")


def config_of(args: argparse.Namespace, model: str, overrides: list[str]) -> Any:
    """Compose verl's config for reading, asking and grading.

    Raises:
        SystemExit: an override of something else, or one that Hydra does not understand.
    """
    for override in overrides:
        if not override.lstrip("+~").startswith(KEYS):
            raise refuse("data", override, f"neither a dataset nor a key under {', '.join(KEYS)}")
    config = composed(overrides)
    config.actor_rollout_ref.model.path = model
    config.data.filter_overlong_prompts = False  # every problem is asked
    config.data.shuffle = False  # or verl would draw those of --limit
    if not any("custom_reward_function.path" in override for override in overrides):
        config.reward.custom_reward_function.path = args.reward
    return config


def read_data(given: str, limit: int, config: Any, prompts: Prompts) -> tuple[str, list[Problem]]:
    """Read a dataset by its name or its file; returns what to call it, and its problems.

    Raises:
        SystemExit: there is no such dataset, or nothing in it to ask.
    """
    if given in DATASETS:
        problems = [Problem(list(row["prompt"]), row) for row in load(given)]
        return given, problems if limit < 0 else problems[:limit]
    if Path(given).suffix not in FORMATS or not Path(given).exists():
        raise refuse("data", given, f"no such {', '.join(FORMATS)} file, and none of {', '.join(DATASETS)}.")
    config.data.val_files, config.data.val_max_samples = [given], limit
    return Path(given).stem, read_problems(config, "val", prompts.tokenizer)
