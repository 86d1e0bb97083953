"""Rewards for drivers that are not verl's trainer: graded by verl's own reward manager, in this process."""

import asyncio
import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from omegaconf import DictConfig

from recipe.soup.errors import first_line, refuse, root_cause
from recipe.soup.records.problems import Problem
from recipe.soup.verl_adapter.rewards import graded

KEY = "reward.custom_reward_function"
KEYWORDS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""By which verl's managers call a reward function."""
Graded = dict[str, Any]
"""`score`, and what else a reward told of a response."""
TURNS = 2
"""Of a prompt and its response, as verl counts them."""


@dataclass(frozen=True)
class Response:
    """What is graded: a response's text, and how many tokens it has."""

    problem: Problem
    text: str
    tokens: int


class _Known:
    """In the place of a tokenizer: what a manager decodes is known already."""

    def __init__(self, text: str) -> None:
        self._text = text

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self._text


class Grader:
    """verl's reward manager with the reward function that a config names, or with verl's own.

    Args:
        config: verl's whole config: `reward`, and `data` for managers that read it.

    Raises:
        SystemExit: the function cannot be loaded or called, or only the real path can grade so; one sentence.
    """

    def __init__(self, config: DictConfig) -> None:
        from verl.trainer.ppo.reward import load_reward_manager  # takes seconds, which other commands spare

        if config.reward.reward_model.enable:
            why = "a reward model needs an engine of its own, which only main_ppo starts"
            raise refuse("reward.reward_model.enable", True, f"{why}; give a reward function instead.")
        named, manager = config.reward.custom_reward_function, config.reward.reward_manager
        try:
            self._manager: Any = load_reward_manager(config, tokenizer=None)
        except Exception as error:  # of any kind: the user's file runs
            what = f"{named.path}:{named.name}" if named.path else f"reward.reward_manager.name={manager.name}"
            cause = root_cause(error)  # verl only says that it could not load the file
            why = f"{type(cause).__name__}: {first_line(cause)}"
            raise refuse(KEY, what, f"cannot be loaded ({why}); mend it, or name another.") from error
        self._asks_for_columns = manager.source == "register"  # a manager of the user's own knows what it needs
        self._file = str(named.path) if named.path and Path(str(named.path)).is_file() else None
        self._require_keywords(named)

    def require_columns(self, problems: Iterable[Problem], key: str, value: Any) -> None:
        """Refuse problems that verl's managers cannot grade.

        Args:
            key, value: where the problems come from, for the sentence.

        Raises:
            SystemExit: a row lacks `data_source` or `reward_model.ground_truth`.
        """
        for problem in problems if self._asks_for_columns else ():
            truth = problem.row.get("reward_model")
            told = isinstance(truth, dict) and truth.get("ground_truth") is not None
            if not told or problem.row.get("data_source") is None:
                why = "a row lacks " + ("data_source" if told else "reward_model.ground_truth")
                raise refuse(key, value, f"{why}, which rewards are given; add the column.")

    @property
    def _function(self) -> Any:
        """The user's function, without the arguments of `reward_kwargs`."""
        compute = self._manager.compute_score
        return compute.args[0] if isinstance(compute, partial) and compute.args else compute

    def _require_keywords(self, named: Any) -> None:
        given = dict(named.get("reward_kwargs") or {}) if named.path else {}
        try:
            inspect.signature(self._function).bind(**dict.fromkeys(KEYWORDS), **given)
        except TypeError as error:
            called = ", ".join((*KEYWORDS, *given))
            why = f"cannot be called as verl calls it, with the keywords {called} ({error})"
            raise refuse(KEY, f"{named.path}:{named.name}", f"{why}; give it these parameters, or **kwargs.") from None

    def source(self) -> str:
        """A checksum of the file in which the reward function stands (an edited one grades anew), or ""."""
        try:
            file = self._file or inspect.getsourcefile(inspect.unwrap(self._function))
        except TypeError:  # an object, which may be called as well
            file = inspect.getsourcefile(type(self._function))
        return f"{crc32(Path(file).read_bytes()):08x}" if file else ""

    def grade(self, responses: Iterable[Response]) -> list[Graded | Exception]:
        """Grade responses, all at a time if the reward function is asynchronous.

        Returns:
            for each `score`, one finite number, and what else the function told (`acc` if it told nothing); or why
            there is no score.
        """
        return self._manager.loop.run_until_complete(self._grade_all(list(responses)))

    async def _grade_all(self, responses: list[Response]) -> list[Any]:
        return await asyncio.gather(*map(self._grade_one, responses))

    async def _grade_one(self, response: Response) -> Graded | Exception:
        manager = copy.copy(self._manager)
        manager.tokenizer = _Known(response.text)
        try:
            result = await manager.run_single(_as_verl_has_it(response))
            score = graded(result["reward_score"], lambda: (response.problem.messages, response.text))
            return {**result["reward_extra_info"], "score": score}
        except Exception as error:  # the user's function runs
            return error


def _as_verl_has_it(response: Response) -> Any:
    from verl import DataProto

    row, ids = response.problem.row, torch.zeros(1, response.tokens, dtype=torch.long)
    # Managers write into it.
    own = {"extra_info": dict(row.get("extra_info") or {}), "__num_turns__": TURNS}
    columns = {key: value for key, value in {**row, **own}.items() if not isinstance(value, torch.Tensor)}
    arrays = {key: np.fromiter([value], dtype=object, count=1) for key, value in columns.items()}
    return DataProto.from_dict(tensors={"responses": ids, "attention_mask": torch.ones_like(ids)}, non_tensors=arrays)
