"""A run's config, prompts and reward tried out by verl's own functions, without a run."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO

from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import first_line, refuse, root_cause
from recipe.soup.records.problems import Problem
from recipe.soup.verl_adapter.grader import KEY, Grader, Response
from recipe.soup.verl_adapter.problems import Prompts, read_problems

ROWS = 64
"""Rows of each set that are tried."""


@dataclass
class Tried:
    """A set's first problems, and the number of tokens of each prompt."""

    problems: list[Problem]
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


def load_prompts(config: DictConfig) -> Prompts:
    """Load what builds prompts, without what transformers prints meanwhile; see `Prompts`."""
    with _quiet():
        return Prompts(config)


def try_prompts(config: DictConfig, prompts: Prompts, key: str) -> Tried:
    """Make the prompts of a set's first rows.

    Args:
        config: verl's composed config.
        prompts: builds them.
        key: train or val.

    Raises:
        SystemExit: the rows cannot be read, or no prompt be made of one.
    """
    first = {"filter_overlong_prompts": False, "shuffle": False, f"{key}_max_samples": ROWS}
    with _quiet():
        problems = read_problems(OmegaConf.merge(config, {"data": first}), key, prompts.tokenizer)  # pyright: ignore[reportArgumentType]
    lengths = []
    for number, problem in enumerate(problems):
        try:
            lengths.append(len(prompts.ids(problem.messages)))
        except Exception as error:  # whatever a template raises
            why = f"no prompt can be made of its row {number} ({_words(error)}); mend the data, or the template."
            raise refuse(f"data.{key}_files", config.data[f"{key}_files"], why) from error
    return Tried(problems, lengths)


def try_reward(config: DictConfig, problems: Sequence[Problem]) -> list[float]:
    """Grade two answers to some problems: none, and the ground truth's own text.

    Returns:
        the scores.

    Raises:
        SystemExit: the function cannot be loaded or called, or a score is not one finite number.
    """
    grader = Grader(config)
    responses = [Response(p, text, len(text)) for p in problems for text in ("", str(p.ground_truth))]
    scores = []
    with _quiet():
        graded = grader.grade(responses)
    for number, (response, told) in enumerate(zip(responses, graded, strict=True)):
        if isinstance(told, Exception):
            why = f"failed on the response {response.text!r} to row {number // 2} ({_words(told)})"
            named = config.reward.custom_reward_function
            raise refuse(KEY, f"{named.path}:{named.name}", f"{why}, and verl would lose it; give it a score instead.")
        scores.append(told["score"])
    return scores


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
    cause = root_cause(error)
    return f"{type(cause).__name__}: {first_line(cause).rstrip('.')}"
