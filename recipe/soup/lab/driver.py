"""The lab's trainer: SOUP's sources and losses around one small model in one process, without Ray, FSDP and vLLM.

Differs from the real path in three ways only: samples enter mini-batches in the order of their prompts (there: in the
order in which they are done), sampler and trainer are the same model (there: two engines), and the learning rate is
constant.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tracking import Tracking
from verl.workers.config.optimizer import build_optimizer

from recipe.soup.algorithm.batch_metrics import drift_metrics, lag_metrics, train_metrics
from recipe.soup.errors import first_line
from recipe.soup.lab.checkpoint import checkpoint_to_resume, read_state, save_checkpoint, step_of, weights_of
from recipe.soup.lab.engine import PastWeights
from recipe.soup.lab.refusals import check_lab_config
from recipe.soup.lab.sampler import Answer, sample
from recipe.soup.lab.update import Sample, Updater, fields_of_loss, rows_before_update
from recipe.soup.lab.validation import Graded, accuracy_metrics
from recipe.soup.prefixes.make_source import make_source
from recipe.soup.prefixes.prefix import Prefix, tokens_to_ask_for
from recipe.soup.prefixes.requests import PromptRequests, SampledPrefix
from recipe.soup.prefixes.source import FinishedSample
from recipe.soup.records.metrics_file import keep_earlier_metrics, metrics_file, trackers, validation_accuracy
from recipe.soup.records.problems import Problem, correctness
from recipe.soup.settings import parse_settings
from recipe.soup.verl_adapter.grader import Grader, Response
from recipe.soup.verl_adapter.problems import Prompts, read_problems
from recipe.soup.verl_adapter.run_facts import run_facts

NO_TEMPERATURE = 1e-6


def _endless(problems: list[Problem], seed: int) -> Iterator[Problem]:
    """Epoch after epoch, each in another order."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(problems, len(problems))


class Lab:
    """One run.

    Args:
        config: verl's composed config; what the lab has no use for is ignored.
    """

    def __init__(self, config: DictConfig) -> None:
        check_lab_config(config)
        rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
        self.config, self.rollout = config, rollout
        # Read once: behind it is an interpolation, and parsing those for every sample took a third of a step.
        self._response_length = int(rollout.response_length)
        self.settings = parse_settings(config.algorithm.get("soup"), self._response_length)
        # What verl's sampler does without a seed: torch's own, always the same.
        seed = torch.Generator().initial_seed() if config.data.seed is None else config.data.seed
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        base_model, checkpoint = config.actor_rollout_ref.model.path, checkpoint_to_resume(config)
        path = base_model if checkpoint is None else weights_of(checkpoint)
        self.prompts = Prompts(config)
        self.tokenizer = self.prompts.tokenizer
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.optimizer = optimizer = build_optimizer(self.model.parameters(), omega_conf_to_dataclass(actor.optim))
        self.updater = Updater(self.model, optimizer, config, self.settings)
        self.grader = Grader(config)
        training = read_problems(config, "train", self.tokenizer)
        self.validation = read_problems(config, "val", self.tokenizer)
        self._problems, self._drawn = _endless(training, seed), 0
        facts = run_facts(config, prompts_per_epoch=len(training), seed=seed)
        self.last_step = facts.last_step
        past_weights = Path(config.trainer.default_local_dir) / "past_weights"
        engine = PastWeights(self.model, self._sample_messages, past_weights)
        self.source = make_source(self.settings, facts, self._fetch, engine, base_model, past_weights)
        self.first_step = 1
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Path) -> None:
        """Go on as if the run had never stopped."""
        state = read_state(checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self._drawn = sum(1 for _ in islice(self._problems, state["drawn"]))
        self.source.load(checkpoint)
        self.first_step = step_of(checkpoint) + 1

    def _save(self, step: int) -> None:
        drawn = self.source.resume_state(lambda: self._drawn)
        state = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(), "drawn": drawn}
        save_checkpoint(self.config, step, self.model, self.tokenizer, self.source, state)

    def _fetch(self) -> tuple[list[Problem], list[Any], int]:
        drawn = self._drawn
        problems = [next(self._problems) for _ in range(self.config.data.train_batch_size)]
        self._drawn += len(problems)
        return problems, [problem.messages for problem in problems], drawn

    def _grade(self, problems: Sequence[Problem], answers: Sequence[list[int]]) -> list[Graded]:
        """Grade answers, each to its problem; token ids as they were sampled."""
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        tokens = map(len, answers)
        graded = self.grader.grade(map(Response, problems, texts, tokens))
        for problem, text, score in zip(problems, texts, graded, strict=True):
            if isinstance(score, Exception):
                asked = problem.messages[-1]["content"]
                raise SystemExit(f"The reward failed: {first_line(score)}. It was given {text!r}, to {asked!r}.")
        return [score for score in graded if not isinstance(score, Exception)]

    def _prompt_ids(self, messages: Any) -> list[int]:
        return self.prompts.ids(messages)

    def _sample(
        self, model: Any, prompts: Sequence[list[int]], tokens: Sequence[int], version: int, validates: bool = False
    ) -> list[Answer]:
        temperature = (self.rollout.val_kwargs if validates else self.rollout).temperature
        return sample(model, prompts, tokens, version, temperature, self.tokenizer.eos_token_id, self.generator)

    def _sample_messages(self, model: Any, prompts: Any, tokens: Sequence[int], version: int) -> list[Answer]:
        return self._sample(model, [self._prompt_ids(messages) for messages in prompts], tokens, version)

    # ------------------------------------------------------------------ one step

    def step(self, step: int) -> dict[str, float]:
        """Sample, update, and tell what happened, under verl's and our names."""
        started = time.perf_counter()
        chunk, prefixes = self.source.take(step)
        rows = [PromptRequests(prefixes=slots) for slots in prefixes]
        self.source.order(step, rows)
        samples, problems, seeds = self._roll_out(chunk.batch, chunk.messages, rows, step - 1)
        self.source.generated(step)
        generated = time.perf_counter()
        batch = rows_before_update(self.model, samples, self.rollout.temperature, step - 1)
        metrics = train_metrics(batch) | drift_metrics(batch, by_trainer=True)
        # `behavior_log_probs=trainer` changes nothing here: the model that samples is the one that is trained.
        self.source.harvest(seeds)
        self.source.in_flight.clear()
        if self.source.wants_responses:
            self.source.keep(
                [
                    FinishedSample(
                        problems[i].messages,
                        chunk.first_ordinal + sample.uid,
                        np.array(sample.response_ids),
                        np.array(sample.log_probs),
                        np.array(sample.versions),
                        sample.reward,
                        batch.entropy[i, : len(sample.response_ids)].numpy(),
                    )
                    for i, sample in enumerate(samples)
                ]
            )
        if self.settings.mixes_lags:
            metrics |= lag_metrics(batch)
        metrics |= self.source.metrics()
        metrics |= self.updater.update(samples, fields_of_loss(batch, self.settings, self.config))
        self.source.updated(step)
        return {
            **metrics,
            "critic/score/mean": float(batch.rewards.mean()),
            "actor/entropy": float(batch.entropy[batch.response_mask].mean()),
            "perf/total_num_tokens": float(batch.response_mask.sum()),
            "timing_s/gen": generated - started,
            "timing_s/step": time.perf_counter() - started,
        }

    def _roll_out(
        self, problems: list[Problem], messages: list[Any], rows: list[PromptRequests], version: int
    ) -> tuple[list[Sample], list[Problem], list[SampledPrefix]]:
        """All of a step's samples and the prefixes that it leaves for later ones, in one batch."""
        started: list[tuple[int, list[int], Prefix | None]] = []
        asked: list[tuple[list[int], int]] = []
        orders = [order for row in rows for per_sample in row.requests.values() for order in per_sample]
        for index, row in enumerate(rows):
            prompt_ids = self._prompt_ids(messages[index])
            for number in range(self.rollout.n):
                prefix, _ = row.take(number)
                started.append((index, prompt_ids, prefix))
                if prefix is None or not prefix.complete:
                    tokens = prefix.token_ids.tolist() if prefix is not None else []
                    asked.append((prompt_ids + tokens, self._response_length - len(tokens)))
        for order in orders:
            ids = self._prompt_ids(order.messages)
            for length in order.lengths.values():
                asked += [(ids, tokens_to_ask_for(length, self._response_length))] * order.candidates
        answers = iter(self._sample(self.model, [ids for ids, _ in asked], [n for _, n in asked], version))
        samples = [self._finish(index, ids, prefix, answers) for index, ids, prefix in started]
        seeds = [
            SampledPrefix.from_answers(
                order, slot, length, [next(answers) for _ in range(order.candidates)], self._prompt_ids(order.messages)
            )
            for order in orders
            for slot, length in order.lengths.items()
        ]
        asked_of = [problems[index] for index, _, _ in started]
        graded = self._grade(asked_of, [sample.response_ids for sample in samples])
        samples = [replace(sample, reward=told["score"]) for sample, told in zip(samples, graded, strict=True)]
        return samples, asked_of, seeds

    def _finish(self, index: int, prompt_ids: list[int], prefix: Prefix | None, answers: Any) -> Sample:
        """Put prefix and continuation together; the reward comes later."""
        ids = prefix.token_ids.tolist() if prefix is not None else []
        log_probs = prefix.log_probs.tolist() if prefix is not None else []
        versions = prefix.versions if prefix is not None else []
        if prefix is None or not prefix.complete:
            answer = next(answers)
            ids, log_probs = ids + answer.token_ids, log_probs + answer.log_probs
            versions = versions + [answer.extra_fields["global_steps"]] * len(answer.token_ids)
        return Sample(prompt_ids, ids, versions, log_probs, float("nan"), index)

    # ------------------------------------------------------------------ validation and the whole run

    def validate(self, step: int) -> dict[str, float]:
        """Unmixed: accuracy, greedy accuracy, unbiased pass@k, mean -log-prob of a token (which estimates the entropy).

        Dumps the samples as verl does, if `trainer.validation_data_dir` says where.
        """
        n = self.rollout.val_kwargs.n
        prompts = [self._prompt_ids(problem.messages) for problem in self.validation]
        asked = [ids for ids in prompts for _ in range(n)]
        answers = self._sample(self.model, asked, [self._response_length] * len(asked), step, validates=True)
        problems = [problem for problem in self.validation for _ in range(n)]
        graded = self._grade(problems, [answer.token_ids for answer in answers])
        if self.config.trainer.get("validation_data_dir"):
            folder = Path(self.config.trainer.validation_data_dir)
            folder.mkdir(parents=True, exist_ok=True)
            inputs = [self.tokenizer.decode(ids) for ids in asked]
            texts = [self.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
            scores = [told["score"] for told in graded]
            rows = pd.DataFrame({"input": inputs, "output": texts, "score": scores, "step": step})
            rows.to_json(folder / f"{step}.jsonl", orient="records", lines=True)
        surprise = [value for answer in answers for value in answer.log_probs]
        return {
            **accuracy_metrics(self.validation, graded, n),
            "soup/val/greedy": self._greedy(prompts),
            "soup/val/entropy": -float(np.mean(surprise)),
        }

    def _validated(self, step: int) -> dict[str, float]:
        metrics = self.validate(step)
        self.source.validated(step, validation_accuracy({step: metrics})[step])
        return metrics

    def _greedy(self, prompts: list[list[int]]) -> float:
        """Accuracy of the most probable tokens: sampled at a temperature at which nothing else is left."""
        limits, eos = [self._response_length] * len(prompts), self.tokenizer.eos_token_id
        answers = sample(self.model, prompts, limits, 0, NO_TEMPERATURE, eos, torch.Generator())
        graded = self._grade(self.validation, [answer.token_ids for answer in answers])
        return float(np.mean([correctness(told) > 0 for told in graded]))

    def fit(self) -> None:
        """The whole run, or what is left of it, logged by verl's trackers; with `trainer.val_only` one validation."""
        trainer = self.config.trainer
        named = trackers(self.config)
        if "file" in named:
            keep_earlier_metrics(metrics_file(self.config), resumed_at=self.first_step - 1)
        # Not on the console, where the progress bar is.
        shown = [name for name in named if name != "console"]
        tracking = Tracking(trainer.project_name, trainer.experiment_name, shown, config={})
        # Not again where a run goes on: a validation draws from the generator that training samples come from.
        if trainer.val_only or (trainer.val_before_train and self.first_step == 1):
            tracking.log(self._validated(self.first_step - 1), step=self.first_step - 1)
        if trainer.val_only:
            return
        steps, done = range(self.first_step, self.last_step + 1), self.first_step - 1
        for step in tqdm(steps, desc=trainer.experiment_name, unit="step", initial=done, total=self.last_step):
            metrics = self.step(step)
            if trainer.test_freq > 0 and (step % trainer.test_freq == 0 or step == self.last_step):
                metrics |= self._validated(step)
            tracking.log(metrics, step=step)
            if trainer.save_freq > 0 and (step % trainer.save_freq == 0 or step == self.last_step):
                self._save(step)
