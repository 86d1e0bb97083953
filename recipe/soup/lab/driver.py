"""The lab's trainer: SOUP's sources and losses around one small model in one process, without Ray, FSDP and vLLM.

Differs from the real path in three ways only: samples enter mini-batches in the order of their prompts (there: in the
order in which they are done), sampler and trainer are the same model (there: two engines), and the learning rate is
constant. `hardware.py` says where it computes, and how.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tracking import Tracking
from verl.workers.config.optimizer import build_optimizer

from recipe.soup.algorithm.batch import TrainRows, splice_behavior_log_probs
from recipe.soup.algorithm.batch_metrics import demonstration_metrics, mismatch_metrics
from recipe.soup.algorithm.update import weight_metrics
from recipe.soup.errors import refuse
from recipe.soup.lab.checkpoint import checkpoint_to_resume, read_state, save_checkpoint, step_of, weights_of
from recipe.soup.lab.collect import collect
from recipe.soup.lab.engine import PastWeights
from recipe.soup.lab.filter_groups import filters
from recipe.soup.lab.finished_samples import finished_samples
from recipe.soup.lab.forward import SharedPrompts, forward
from recipe.soup.lab.hardware import hardware
from recipe.soup.lab.measures import measured
from recipe.soup.lab.recompute import recompute
from recipe.soup.lab.refusals import check_lab_config
from recipe.soup.lab.rollout import Group, Rollout
from recipe.soup.lab.sampler import sample
from recipe.soup.lab.scores import LabScores
from recipe.soup.lab.static_sampler import StaticSampler
from recipe.soup.lab.training_problems import TrainingProblems
from recipe.soup.lab.update import Updater, fields_of_loss, rows_before_update
from recipe.soup.lab.validation import Validation
from recipe.soup.prefixes.demonstrations import Demonstrations
from recipe.soup.prefixes.make_source import make_source
from recipe.soup.prefixes.resume import resume
from recipe.soup.records.earlier_runs import put_aside, started_anew
from recipe.soup.records.metrics_file import keep_earlier_metrics, metrics_file, trackers, validation_accuracy
from recipe.soup.run_settings import run_settings
from recipe.soup.verl_adapter.broken_steps import BrokenSteps
from recipe.soup.verl_adapter.grader import Grader
from recipe.soup.verl_adapter.missing_samples import MissingSamples
from recipe.soup.verl_adapter.problems import Prompts, read_problems
from recipe.soup.verl_adapter.registrations import update_choices
from recipe.soup.verl_adapter.run_facts import run_facts
from verl_ext.health import NOTICE


class Lab:
    """One run.

    Args:
        config: verl's composed config; what the lab has no use for is ignored.
    """

    def __init__(self, config: DictConfig) -> None:
        check_lab_config(config)
        rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
        self.config = config
        self.settings = run_settings(config)
        # What verl's sampler does without a seed: torch's own, always the same.
        seed = torch.Generator().initial_seed() if config.data.seed is None else config.data.seed
        torch.manual_seed(seed)
        base_model, checkpoint = config.actor_rollout_ref.model.path, checkpoint_to_resume(config)
        path = base_model if checkpoint is None else weights_of(checkpoint)
        prompts = Prompts(config)
        self.tokenizer = prompts.tokenizer
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.hardware = chosen = hardware(config, self.model.config.vocab_size)
        if chosen.shares_prompts and self.settings.verifies and self.settings.verification.rejected == "residual":
            key, why = "algorithm.soup.verification.rejected", "stores a whole distribution for every token"
            toy = "that is for a toy's vocabulary on a CPU; set it to sampled, or trainer.device=cpu for a toy"
            raise refuse(key, "residual", f"{why}, and {toy}.")
        self.model.to(chosen.device)
        self.generator = torch.Generator(chosen.device).manual_seed(seed)
        self.optimizer = optimizer = build_optimizer(self.model.parameters(), omega_conf_to_dataclass(actor.optim))
        computes = SharedPrompts(chosen) if chosen.shares_prompts else forward
        samples = StaticSampler(self.model, chosen) if chosen.shares_prompts else sample
        self.updater = Updater(self.model, optimizer, config, self.settings, computes)
        self.rollout = Rollout(config, self.model, prompts, Grader(config), self.generator, samples)
        self.broken = BrokenSteps(self.settings.broken_steps)
        per_step = rollout.n * config.data.train_batch_size
        self.missing = MissingSamples(per_step, self.settings.max_lost_share, self.rollout.take_error)
        training = read_problems(config, "train", self.tokenizer)
        validated = read_problems(config, "val", self.tokenizer)
        self.validation = Validation(config, validated, prompts, self.rollout, self.generator, self.missing)
        # verl wants single prompts where it refills, so that it can ask for any number of them.
        self.problems = TrainingProblems(training, seed, 1 if filters(config) else config.data.train_batch_size)
        facts = run_facts(config, prompts_per_epoch=len(training), seed=seed)
        self.last_step = facts.last_step
        past_weights = Path(config.trainer.default_local_dir) / "past_weights"
        engine = PastWeights(self.model, self.rollout.sample_messages, past_weights)
        shown = Demonstrations(self.settings.demonstrations, self.tokenizer, lambda batch: [p.row for p in batch])
        own_way = self.updater if chosen.shares_prompts else None
        self.scores = LabScores(self.model, rollout.temperature, self.tokenizer.eos_token_id, own_way)
        self.source = make_source(
            self.settings, facts, self.problems.fetch, engine, base_model, past_weights, shown, self.scores
        )
        self.first_step = 1
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Path) -> None:
        """Go on as if the run had never stopped."""
        state = read_state(checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        if len(state["generator"]) != len(self.generator.get_state()):
            why = "the checkpoint was written on a device of another kind, with other random numbers; use that."
            raise refuse("trainer.device", self.hardware.device.type, why)
        self.generator.set_state(state["generator"])
        self.problems.skip(state["drawn"])
        resume(self.source, checkpoint, step_of(checkpoint))
        if self.settings.verifies:
            self.source.updated(step_of(checkpoint))  # what was verified is not kept, since it is drawn again
        self.first_step = step_of(checkpoint) + 1

    def _save(self, step: int) -> None:
        drawn = self.source.resume_state(lambda: self.problems.drawn)
        state = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(), "drawn": drawn}
        save_checkpoint(self.config, step, self.model, self.tokenizer, self.source, state)

    # ------------------------------------------------------------------ one step

    @property
    def _bypasses(self) -> bool:
        """Whether old log-probs are the sampler's, which saves the trainer's forward pass."""
        return bool(self.config.algorithm.rollout_correction.bypass_mode)

    @property
    def _recomputes(self) -> bool:
        """Whether prefixes get the trainer's log-probs: in float32 the sampler has the same."""
        return self.settings.behavior_log_probs == "trainer" and self.hardware.dtype != torch.float32

    def _keep(self, groups: Sequence[Group], batch: TrainRows | None) -> None:
        """Hand the samples of groups to the source; `batch` has them if they are trained on."""
        known = None
        if batch is not None and self._recomputes:
            known = splice_behavior_log_probs(batch.current_log_probs, batch.behavior_log_probs, batch.is_historical)
        samples = [sample for group in groups for sample in group.samples]
        exact = self.settings.verifies and self.settings.verification.rejected == "residual"
        whole = self.scores.of_samples(samples) if exact else None
        entropy = None if batch is None or self._bypasses else batch.entropy
        self.source.keep(finished_samples(groups, known, entropy, whole))

    def step(self, step: int) -> dict[str, float]:
        """Sample, update, and tell what happened, under verl's and our names."""
        started = time.perf_counter()
        collected, seeds = collect(step, self.config, self.source, self.rollout, self.missing)
        self.source.generated(step)
        generated = time.perf_counter()
        samples = [replace(s, uid=uid) for uid, group in enumerate(collected.groups) for s in group.samples]
        evicted = [sample for group in collected.dropped for sample in group.samples]
        own_way = self.updater if self.hardware.shares_prompts else None
        temperature = self.config.actor_rollout_ref.rollout.temperature
        batch = rows_before_update(self.model, samples, temperature, step - 1, own_way, self._bypasses)
        by_trainer = self._recomputes or self.hardware.dtype == torch.float32
        metrics = measured(batch, by_trainer, self.settings.mixes_lags, self._bypasses)
        metrics |= self.missing.metrics(step, len(samples)) | collected.metrics
        metrics["soup/cost/evicted_tokens"] = float(sum(s.versions.count(step - 1) for s in evicted))
        if self._recomputes:
            seeds, mismatch = recompute(seeds, self.updater)
            metrics |= mismatch_metrics(mismatch)
        self.source.harvest(seeds)
        self.source.in_flight.clear()
        if self.source.wants_responses:
            self._keep(collected.groups, batch)
        if self.source.wants_evicted:
            self._keep(collected.dropped, None)
        if self.settings.demonstrates:
            gate = self.settings.demonstrations
            metrics |= demonstration_metrics(batch, gate.gate, gate.gate_successes)
        metrics |= self.source.metrics()
        fields, trained = fields_of_loss(batch, self.settings, self.config)
        if self.settings.mixes:
            metrics |= weight_metrics(batch, fields["advantages"], trained, update_choices(self.settings))
        metrics |= self.broken.before_update(step, fields["response_mask"] * fields["loss_mask"])
        metrics |= self.updater.update(samples, fields)
        metrics |= self.broken.after_update(step, metrics)
        self.source.updated(step)
        return {
            **metrics,
            "critic/score/mean": float(batch.rewards.mean()),
            "perf/total_num_tokens": float(batch.response_mask.sum()),
            "timing_s/gen": generated - started,
            "timing_s/step": time.perf_counter() - started,
        }

    # ------------------------------------------------------------------ the whole run

    def _validated(self, step: int) -> dict[str, float]:
        metrics = self.validation(self.model, step)
        self.source.validated(step, validation_accuracy({step: metrics})[step])
        return metrics

    def fit(self) -> None:
        """The whole run, or what is left of it, logged by verl's trackers; with `trainer.val_only` one validation."""
        trainer = self.config.trainer
        named = trackers(self.config)
        if self.first_step == 1 and (said := put_aside(started_anew(self.config))):
            print(f"{NOTICE}{said}", flush=True)
        if "file" in named and (said := keep_earlier_metrics(metrics_file(self.config), self.first_step - 1)):
            print(f"{NOTICE}{said}", flush=True)
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
