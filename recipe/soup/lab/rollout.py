"""The lab's rollout: prompts, prefixes and requests become graded groups, and prefixes for later steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig

from recipe.soup.lab.forward import Sample
from recipe.soup.lab.sampler import Answer, Sampler
from recipe.soup.prefixes.prefix import Prefix, tokens_to_ask_for
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, SampledPrefix
from recipe.soup.records.problems import Problem
from recipe.soup.verl_adapter.grader import Graded, Grader, Response
from recipe.soup.verl_adapter.missing_samples import MissingSamples
from recipe.soup.verl_adapter.problems import Prompts
from verl_ext.failures import in_a_line


@dataclass(frozen=True)
class Asked:
    """A prompt of a step.

    Attributes:
        problem: what its samples are graded by.
        ordinal: its place in the order of training.
        requests: the prefixes of its samples, and what to sample for later.
    """

    problem: Problem
    ordinal: int
    requests: PromptRequests


@dataclass(frozen=True)
class Group:
    """A prompt's samples, without those whose reward failed, and what their rewards told."""

    asked: Asked
    samples: list[Sample]
    told: list[Graded]


class Rollout:
    """Samples with one model, and has the samples graded.

    Args:
        config: verl's whole config.
        model: samples; its weights change between calls.
        prompts: builds prompts.
        grader: grades.
        generator: where the randomness comes from.
        sampler: how tokens are sampled.
    """

    def __init__(
        self,
        config: DictConfig,
        model: Any,
        prompts: Prompts,
        grader: Grader,
        generator: torch.Generator,
        sampler: Sampler,
    ) -> None:
        rollout = config.actor_rollout_ref.rollout
        self._model, self._prompts, self._grader, self._generator = model, prompts, grader, generator
        self.sampler = sampler
        self._samples, self._temperature = int(rollout.n), float(rollout.temperature)
        # Read once: behind it is an interpolation, and parsing those for every sample took a third of a step.
        self._response_length = int(rollout.response_length)
        self._error: str | None = None

    def sample_messages(self, model: Any, prompts: Any, tokens: Sequence[int], version: int) -> list[Answer]:
        """Sample for training, from chat messages; the interface of `PastWeights`."""
        return self.sample(model, [self._prompts.in_training(messages) for messages in prompts], tokens, version)

    def sample(self, model: Any, prompts: Sequence[list[int]], tokens: Sequence[int], version: int) -> list[Answer]:
        """Sample for training, at the rollout's temperature."""
        eos = self._prompts.tokenizer.eos_token_id
        return self.sampler(model, prompts, tokens, version, self._temperature, eos, self._generator)

    def grade(self, problems: Sequence[Problem], answers: Sequence[list[int]]) -> list[Graded | None]:
        """Grade answers, each to its problem; token ids as they were sampled. None where the reward failed."""
        texts = [self._prompts.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        graded = self._grader.grade(map(Response, problems, texts, map(len, answers)))
        for told in graded:
            if isinstance(told, Exception):
                self._error = self._error or in_a_line(told)
        return [None if isinstance(told, Exception) else told for told in graded]

    def take_error(self) -> str | None:
        """Return the first reward that failed since the last call, in a line."""
        error, self._error = self._error, None
        return error

    def groups(
        self, batch: Sequence[Asked], version: int, missing: MissingSamples
    ) -> tuple[list[Group], list[SampledPrefix]]:
        """All samples of these prompts, and the prefixes that they leave for later steps, in one batch.

        Args:
            version: of the model's weights.
            missing: counts the samples that are lost.
        """
        started: list[tuple[int, list[int], Prefix | None]] = []
        asked: list[tuple[list[int], int]] = []
        hosted: list[tuple[int, PrefixRequest]] = []  # with the place of the sample that hosts the request
        for index, prompt in enumerate(batch):
            prompt_ids = self._prompts.in_training(prompt.problem.messages)
            for number in range(self._samples):
                prefix, orders = prompt.requests.take(number)
                hosted += [(len(started), order) for order in orders]
                started.append((index, prompt_ids, prefix))
                if prefix is None or not prefix.complete:
                    tokens = prefix.token_ids.tolist() if prefix is not None else []
                    asked.append((prompt_ids + tokens, self._response_length - len(tokens)))
        for _, order in hosted:
            ids = self._prompts.in_training(order.messages)
            for length in order.lengths.values():
                asked += [(ids, tokens_to_ask_for(length, self._response_length))] * order.candidates
        answers = iter(self.sample(self._model, [ids for ids, _ in asked], [n for _, n in asked], version))
        samples = [_finish(index, ids, prefix, answers) for index, ids, prefix in started]
        graded = self.grade([batch[s.uid].problem for s in samples], [s.response_ids for s in samples])
        # The prefixes that a sample brings for later are lost with it.
        seeds = [seed for host, seed in self._seeds(hosted, answers) if graded[host] is not None]
        groups = [Group(prompt, [], []) for prompt in batch]
        for one, told in zip(samples, graded, strict=True):
            if told is not None:
                groups[one.uid].samples.append(replace(one, reward=told["score"]))
                groups[one.uid].told.append(told)
        missing.add(version + 1, len(samples), sum(len(group.samples) for group in groups))
        return groups, seeds

    def _seeds(
        self, hosted: list[tuple[int, PrefixRequest]], answers: Iterator[Answer]
    ) -> Iterator[tuple[int, SampledPrefix]]:
        for host, order in hosted:
            ids = self._prompts.in_training(order.messages)
            for slot, length in order.lengths.items():
                candidates = [next(answers) for _ in range(order.candidates)]
                yield host, SampledPrefix.from_answers(order, slot, length, candidates, ids)


def _finish(index: int, prompt_ids: list[int], prefix: Prefix | None, answers: Iterator[Answer]) -> Sample:
    """Put prefix and continuation together; the reward comes later."""
    ids = prefix.token_ids.tolist() if prefix is not None else []
    log_probs = prefix.log_probs.tolist() if prefix is not None else []
    versions = prefix.versions if prefix is not None else []
    if prefix is None or not prefix.complete:
        answer = next(answers)
        ids, log_probs = ids + answer.token_ids, log_probs + answer.log_probs
        versions = versions + [answer.extra_fields["global_steps"]] * len(answer.token_ids)
    return Sample(prompt_ids, ids, versions, log_probs, float("nan"), index)
