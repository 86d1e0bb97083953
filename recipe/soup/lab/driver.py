"""The lab's trainer: SOUP's sources and losses around one small model in one process, without Ray, FSDP and vLLM.

Differs from the real path in three ways only: samples enter mini-batches in the order of their prompts (there: in the
order in which they are done), sampler and trainer are the same model (there: two engines), and the learning rate is
constant.
"""

import random
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tracking import Tracking
from verl.workers.config.optimizer import build_optimizer

from recipe.soup.algorithm.batch_metrics import drift_metrics, lag_metrics, train_metrics
from recipe.soup.checks.losses import GROUP_ONLY
from recipe.soup.errors import refuse
from recipe.soup.lab.checkpoint import checkpoint_to_resume, read_state, save_checkpoint, step_of, weights_of
from recipe.soup.lab.engine import PastWeights
from recipe.soup.lab.sampler import Answer, sample
from recipe.soup.lab.update import Sample, Updater, fields_of_loss, rows_before_update
from recipe.soup.prefixes.make_source import make_source
from recipe.soup.prefixes.prefix import Prefix, tokens_to_ask_for
from recipe.soup.prefixes.requests import PromptRequests, SampledPrefix
from recipe.soup.prefixes.source import FinishedSample
from recipe.soup.records.metrics_file import keep_earlier_metrics, metrics_file
from recipe.soup.records.pass_at_k import PASS_AT, mean_pass_at_k
from recipe.soup.records.problems import Problem, read_problems
from recipe.soup.settings import parse_settings
from recipe.soup.verl_adapter.broken_steps import BrokenSteps
from recipe.soup.verl_adapter.missing_samples import MissingSamples
from recipe.soup.verl_adapter.probes import load_reward
from recipe.soup.verl_adapter.rewards import graded
from recipe.soup.verl_adapter.run_facts import run_facts
from verl_ext.failures import in_a_line

NO_TEMPERATURE = 1e-6
ROLLOUT = "actor_rollout_ref.rollout"
ONLY_REAL: dict[str, tuple[Any, ...]] = {
    "algorithm.filter_groups.enable": (False,),
    "algorithm.use_kl_in_reward": (False,),
    "algorithm.rollout_correction.bypass_mode": (False,),
    "algorithm.rollout_correction.rollout_rs": (None,),
    "actor_rollout_ref.actor.use_kl_loss": (False,),
    "actor_rollout_ref.actor.shuffle": (False,),
    "actor_rollout_ref.actor.optim.lr_scheduler_type": ("constant",),
    "actor_rollout_ref.actor.optim.lr_warmup_steps": (-1, 0, None),
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": (0.0,),
    "actor_rollout_ref.model.lora_rank": (0,),
    f"{ROLLOUT}.top_p": (1.0,),
    f"{ROLLOUT}.top_k": (-1, 0),
    f"{ROLLOUT}.min_p": (0.0, None),
    f"{ROLLOUT}.repetition_penalty": (1.0, None),
    f"{ROLLOUT}.val_kwargs.top_p": (1.0,),
    f"{ROLLOUT}.val_kwargs.top_k": (-1, 0),
    f"{ROLLOUT}.val_kwargs.do_sample": (True,),
    f"{ROLLOUT}.ignore_eos": (False,),
    "data.custom_cls.path": (None,),
    "data.shuffle": (True,),
    "trainer.critic_warmup": (0,),
    "trainer.v1.trainer_mode": ("soup",),
}
"""What the lab would ignore: key, and the values at which that makes no difference."""


def check_lab_config(config: DictConfig) -> None:
    """Refuse what only the real path can do.

    Raises:
        SystemExit: which key, which value, what to do.
    """
    for key, allowed in ONLY_REAL.items():
        value = OmegaConf.select(config, key, default=allowed[0])
        if value not in allowed:
            raise refuse(key, value, f"only the real path can do that; set it to {allowed[0]}, or use main_ppo.")
    estimator = config.algorithm.adv_estimator
    if estimator in GROUP_ONLY:
        raise refuse("algorithm.adv_estimator", estimator, "only the real path can do that; use soup, grpo or rloo.")


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
        torch.manual_seed(config.data.seed)
        self.generator = torch.Generator().manual_seed(config.data.seed)
        base_model, checkpoint = config.actor_rollout_ref.model.path, checkpoint_to_resume(config)
        path = base_model if checkpoint is None else weights_of(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.optimizer = optimizer = build_optimizer(self.model.parameters(), omega_conf_to_dataclass(actor.optim))
        self.updater = Updater(self.model, optimizer, config, self.settings)
        self.broken = BrokenSteps(self.settings.broken_steps)
        self._error: str | None = None
        samples = rollout.n * config.data.train_batch_size
        self.missing = MissingSamples(samples, self.settings.max_lost_share, self._take_error)
        named = config.reward.custom_reward_function
        self._reward = load_reward(named.path, named.name)
        training = read_problems(config.data.train_files, config.data.train_max_samples)
        self.validation = read_problems(config.data.val_files, config.data.val_max_samples)
        self._problems, self._drawn = _endless(training, config.data.seed), 0
        facts = run_facts(config, prompts_per_epoch=len(training), seed=config.data.seed)
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

    def _score(self, problem: Problem, text: str) -> float:
        return float(self._reward(problem, text)["score"])

    def _graded(self, problem: Problem, text: str) -> float | None:
        """The reward; None if it failed, as verl loses such a sample."""
        try:
            return graded(self._score(problem, text), lambda: (problem.messages, text))
        except Exception as error:
            self._error = self._error or in_a_line(error)
            return None

    def _take_error(self) -> str | None:
        error, self._error = self._error, None
        return error

    def _prompt_ids(self, messages: Any) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

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
        metrics |= self.missing.metrics(step, len(samples))
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
                    )
                    for i, sample in enumerate(samples)
                ]
            )
        if self.settings.mixes_lags:
            metrics |= lag_metrics(batch)
        metrics |= self.source.metrics()
        fields = fields_of_loss(batch, self.settings, self.config)
        metrics |= self.broken.before_update(step, fields["response_mask"] * fields["loss_mask"])
        metrics |= self.updater.update(samples, fields)
        metrics |= self.broken.after_update(step, metrics)
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
        orders = [
            (index * self.rollout.n + number, order)
            for index, row in enumerate(rows)
            for number, per_sample in row.requests.items()
            for order in per_sample
        ]
        for index, row in enumerate(rows):
            prompt_ids = self._prompt_ids(messages[index])
            for number in range(self.rollout.n):
                prefix, _ = row.take(number)
                started.append((index, prompt_ids, prefix))
                if prefix is None or not prefix.complete:
                    tokens = prefix.token_ids.tolist() if prefix is not None else []
                    asked.append((prompt_ids + tokens, self._response_length - len(tokens)))
        for _, order in orders:
            ids = self._prompt_ids(order.messages)
            for length in order.lengths.values():
                asked += [(ids, tokens_to_ask_for(length, self._response_length))] * order.candidates
        answers = iter(self._sample(self.model, [ids for ids, _ in asked], [n for _, n in asked], version))
        samples = [self._finish(problems[index], index, ids, prefix, answers) for index, ids, prefix in started]
        seeds = [
            SampledPrefix.from_answers(
                order, slot, length, [next(answers) for _ in range(order.candidates)], self._prompt_ids(order.messages)
            )
            for _, order in orders
            for slot, length in order.lengths.items()
        ]
        hosts = [host for host, order in orders for _ in order.lengths]
        arrived = [sample for sample in samples if sample is not None]
        self.missing.add(version + 1, len(samples), len(arrived))
        # The prefixes that a sample brings for later are lost with it.
        brought = [seed for host, seed in zip(hosts, seeds, strict=True) if samples[host] is not None]
        return arrived, [problems[sample.uid] for sample in arrived], brought

    def _finish(
        self, problem: Problem, index: int, prompt_ids: list[int], prefix: Prefix | None, answers: Any
    ) -> Sample | None:
        ids = prefix.token_ids.tolist() if prefix is not None else []
        log_probs = prefix.log_probs.tolist() if prefix is not None else []
        versions = prefix.versions if prefix is not None else []
        if prefix is None or not prefix.complete:
            answer = next(answers)
            ids, log_probs = ids + answer.token_ids, log_probs + answer.log_probs
            versions = versions + [answer.extra_fields["global_steps"]] * len(answer.token_ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        reward = self._graded(problem, text)
        return None if reward is None else Sample(prompt_ids, ids, versions, log_probs, reward, index)

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
        texts = [self.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
        scores = pd.Series([self._graded(*sample) for sample in zip(problems, texts, strict=True)], dtype=float)
        if not scores.count():
            self.missing.none_left(f"The validation after step {step}")
        if self.config.trainer.get("validation_data_dir"):
            folder = Path(self.config.trainer.validation_data_dir)
            folder.mkdir(parents=True, exist_ok=True)
            inputs = [self.tokenizer.decode(ids) for ids in asked]
            rows = pd.DataFrame({"input": inputs, "output": texts, "score": scores, "step": step})
            rows[scores.notna()].to_json(folder / f"{step}.jsonl", orient="records", lines=True)
        correct = (scores.to_numpy() > 0).reshape(-1, n).sum(axis=1)  # those that were lost count as wrong
        surprise = [value for answer in answers for value in answer.log_probs]
        source = self.validation[0].data_source
        metrics = {
            f"val-core/{source}/acc/mean@{n}": correct.mean() / n,
            "soup/val/greedy": self._greedy(prompts),
            "soup/val/entropy": -float(np.mean(surprise)),
            **self.missing.validated(step, len(scores), int(scores.count())),
        }
        for k in (k for k in PASS_AT if k <= n):
            metrics[f"soup/val/{source}/pass@{k}"] = mean_pass_at_k([(n, int(hits)) for hits in correct], k)
        return metrics

    def _validated(self, step: int) -> dict[str, float]:
        metrics = self.validate(step)
        self.source.validated(step, next(iter(metrics.values())))
        return metrics

    def _greedy(self, prompts: list[list[int]]) -> float:
        """Accuracy of the most probable tokens: sampled at a temperature at which nothing else is left."""
        limits, eos = [self._response_length] * len(prompts), self.tokenizer.eos_token_id
        answers = sample(self.model, prompts, limits, 0, NO_TEMPERATURE, eos, torch.Generator())
        texts = [self.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
        scores = [self._graded(*sample) for sample in zip(self.validation, texts, strict=True)]
        return float(np.mean([score is not None and score > 0 for score in scores]))

    def fit(self) -> None:
        """The whole run, or what is left of it, logged by verl's trackers; with `trainer.val_only` one validation."""
        trainer = self.config.trainer
        if "file" in trainer.logger:
            keep_earlier_metrics(metrics_file(self.config), resumed_at=self.first_step - 1)
        # Not on the console, where the progress bar is.
        trackers = [name for name in trainer.logger if name != "console"]
        tracking = Tracking(trainer.project_name, trainer.experiment_name, trackers, config={})
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
