"""The lab's validation, which is never mixed, under the names of verl's metrics and ours on the real path."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig

from recipe.soup.lab.rollout import Rollout
from recipe.soup.lab.sampler import Answer
from recipe.soup.records.pass_at_k import pass_metrics
from recipe.soup.records.problems import Problem, correctness
from recipe.soup.verl_adapter.grader import Graded
from recipe.soup.verl_adapter.missing_samples import MissingSamples
from recipe.soup.verl_adapter.problems import Prompts

NO_TEMPERATURE = 1e-6


def accuracy_metrics(problems: Sequence[Problem], graded: Sequence[Graded | None], n: int) -> dict[str, float]:
    """Mean accuracy and unbiased pass@k for each data source.

    Args:
        problems: of a validation.
        graded: `n` responses to each problem, one problem after the other; None is wrong.
    """
    values: dict[str, list[float]] = defaultdict(list)
    scores, expected = [], {}
    for number, problem in enumerate(problems):
        group = (problem.data_source, str(number))
        expected[group] = n
        for told in graded[number * n : (number + 1) * n]:
            correct = 0.0 if told is None else correctness(told)
            values[problem.data_source].append(correct)
            scores.append((group, correct))
    name = "acc" if any("acc" in told for told in graded if told is not None) else "reward"
    means = {f"val-core/{source}/{name}/mean@{n}": float(np.mean(found)) for source, found in values.items()}
    return means | pass_metrics(scores, expected)


class Validation:
    """Validates a model: accuracy, also of greedy answers, unbiased pass@k, and an estimate of the entropy.

    Args:
        config: verl's whole config.
        problems: what is asked.
        prompts: builds prompts.
        rollout: grades.
        generator: where the randomness comes from.
        missing: counts the samples that are lost.
    """

    def __init__(
        self,
        config: DictConfig,
        problems: Sequence[Problem],
        prompts: Prompts,
        rollout: Rollout,
        generator: torch.Generator,
        missing: MissingSamples,
    ) -> None:
        chosen = config.actor_rollout_ref.rollout
        self._n, self._temperature = int(chosen.val_kwargs.n), float(chosen.val_kwargs.temperature)
        self._response_length = int(chosen.response_length)
        self._folder = config.trainer.get("validation_data_dir")
        self._problems, self._prompts, self._tokenizer = problems, prompts, prompts.tokenizer
        self._rollout, self._generator, self._missing = rollout, generator, missing

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        """Validate after `step` updates, and dump the samples if `trainer.validation_data_dir` says where."""
        asked = [problem for problem in self._problems for _ in range(self._n)]
        answers = self._sample(model, asked, step, self._temperature, self._generator)
        graded = self._rollout.grade(asked, [answer.token_ids for answer in answers])
        arrived = sum(told is not None for told in graded)
        if arrived == 0:
            self._missing.none_left(f"The validation after step {step}")
        if self._folder:
            self._dump(Path(self._folder), step, asked, answers, graded)
        surprise = [value for answer in answers for value in answer.log_probs]
        return {
            **accuracy_metrics(self._problems, graded, self._n),
            "soup/val/greedy": self._greedy(model, step),
            "soup/val/entropy": -float(np.mean(surprise)),
            **self._missing.validated(step, len(graded), arrived),
        }

    def _sample(
        self, model: Any, problems: Sequence[Problem], step: int, temperature: float, generator: torch.Generator
    ) -> list[Answer]:
        prompts = [self._prompts.in_training(problem.messages) for problem in problems]
        limits = [self._response_length] * len(prompts)
        eos = self._tokenizer.eos_token_id
        return self._rollout.sampler(model, prompts, limits, step, temperature, eos, generator)

    def _greedy(self, model: Any, step: int) -> float:
        """Accuracy of the most probable tokens: sampled at a temperature at which nothing else is left."""
        answers = self._sample(model, self._problems, step, NO_TEMPERATURE, torch.Generator(self._generator.device))
        graded = self._rollout.grade(self._problems, [answer.token_ids for answer in answers])
        return float(np.mean([told is not None and correctness(told) > 0 for told in graded]))

    def _dump(
        self,
        folder: Path,
        step: int,
        asked: Sequence[Problem],
        answers: Sequence[Answer],
        graded: Sequence[Graded | None],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "input": self._tokenizer.decode(self._prompts.in_training(problem.messages)),
                "output": self._tokenizer.decode(answer.token_ids, skip_special_tokens=True),
                "score": told["score"],
                "step": step,
            }
            for problem, answer, told in zip(asked, answers, graded, strict=True)
            if told is not None
        ]
        pd.DataFrame(rows).to_json(folder / f"{step}.jsonl", orient="records", lines=True)
