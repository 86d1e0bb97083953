"""The trainers, subclasses of verl's: what is made, started and watched. What a step does is in the stages' files.

verl imports this module right after its own trainers, in the process that runs the training loop.
"""

import logging
from functools import partial
from typing import Any, cast

import ray
from verl.trainer.distillation import is_distillation_enabled
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name

from recipe.soup.names import ASYNC_TRAINER_MODE, SEPARATE_TRAINER_MODE, TRAINER_MODE
from recipe.soup.records.metrics_file import keep_earlier_metrics, metrics_file, trackers
from recipe.soup.run_settings import in_float16, run_settings
from recipe.soup.verl_adapter.broken_steps import BrokenSteps
from recipe.soup.verl_adapter.checkpoint_stage import CheckpointStage
from recipe.soup.verl_adapter.dump import DumpStage
from recipe.soup.verl_adapter.historical_adapters import HistoricalAdapters
from recipe.soup.verl_adapter.historical_replicas import HistoricalReplicas
from recipe.soup.verl_adapter.lost_samples import LostSamples
from recipe.soup.verl_adapter.prompt_stage import PromptStage
from recipe.soup.verl_adapter.registrations import soup_loss, weigh_decoupled
from recipe.soup.verl_adapter.replay_buffer import listen
from recipe.soup.verl_adapter.step_stage import StepStage
from recipe.soup.verl_adapter.step_state import StepState
from recipe.soup.verl_adapter.sync_stage import SyncStage
from recipe.soup.verl_adapter.validation import ValidationStage
from verl_ext.detached_worker import KeepingActorWorker
from verl_ext.health import NOTICE, RolloutWatchdog, end_run, handshake, transfer_queue_actors
from verl_ext.stalls import StallWatch, what_grades
from verl_ext.versioned_client import VersionedLLMServerClient
from verl_ext.weight_arrivals import stale_weights

CPU_POLL_SECONDS = 0.05
"""verl polls for finished samples every 2 s: most of a step on a laptop, and next to nothing of one on GPUs, where a
poll would also list many more samples."""


class SoupStages(CheckpointStage, PromptStage, StepStage, SyncStage, ValidationStage, DumpStage):
    """One of verl's trainers with a prefix source in front, and SOUP's update; each stage has a file.

    With `mixed_share=0` nothing is queued, seeded or spliced, and every step is verl's GRPO step.
    """

    def __init__(self, config: Any) -> None:
        self.collected = StepState()
        self.settings = run_settings(config)
        samples, mode = config.actor_rollout_ref.rollout.n, config.trainer.v1.get(self.trainer_mode, {})
        per_update = samples * config.data.train_batch_size // mode.get("parameter_sync_step", 1)
        self.lost = LostSamples(samples, per_update, self.settings.max_lost_share)
        self.broken = BrokenSteps(self.settings.broken_steps, in_float16(config))
        past_weights = self.settings.mixes and self.settings.source == "snapshot"
        made = HistoricalAdapters if self.settings.snapshot.placement == "shared" else HistoricalReplicas
        self.history = made(config, self.settings) if past_weights else None
        weigh_decoupled(config, self.settings)
        super().__init__(config)

    def _build_replay_buffer(self) -> ReplayBuffer:
        replay_buffer = super()._build_replay_buffer()
        if self.settings.max_wait is not None:
            StallWatch(self.settings.max_wait, self._stalled).watch(replay_buffer)
        self.lost.watch(replay_buffer)
        listen(replay_buffer, dropped=self._drop_groups, validates=self._measure_surprise)
        if get_device_name() == "cpu":
            replay_buffer.poll_interval = CPU_POLL_SECONDS
        return replay_buffer

    def _stalled(self, partition_id: str) -> None:
        step = f"{'Step' if partition_id == 'train' else 'The validation of step'} {self.global_steps}"
        end_run(
            f"{step} has waited {self.settings.max_wait:g} s for a sample, and none came. "
            f"{what_grades(self.reward_loop_manager.reward_loop_workers)} Give it a time limit, or raise "
            "algorithm.soup.max_wait (null: wait for ever)."
        )

    def on_init_end(self) -> None:
        if self.history is not None:
            # Now the current policy's engine sleeps, so a colocated one finds room.
            self.history.start(self)
        if self.global_steps > 0 and (self.history is not None or self.settings.verifies):
            # verl saves a checkpoint before the end of its step. There this version would have been kept, and the
            # responses verified with which the next step's prompts begin.
            self.source.updated(self.global_steps)
        super().on_init_end()
        self._install_loss()

    def _install_loss(self) -> None:
        if is_distillation_enabled(self.config.get("distillation")):
            return  # verl's own loss stays; `algorithm=soup` refuses distillation
        actor_config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(soup_loss, config=actor_config, settings=self.settings))

    def fit(self, agent_loop_manager: Any) -> None:
        # The twin may run on another engine, whose servers have no such questions to answer.
        vllm = self.config.actor_rollout_ref.rollout.name == "vllm"
        self.engines = list(self._synced_manager.get_replicas()) if vllm else []
        managers = self._rollout_server_managers() if vllm else []
        replicas = [replica for manager in managers for replica in manager.get_replicas()]
        replicas += self.history.replicas if self.history is not None else []
        agents = list(getattr(agent_loop_manager, "agent_loop_workers", []))
        handshake(self.actor_rollout_wg.workers, replicas, agents)
        stale_weights(self.engines)  # from here on: what the engine has before the first step
        self.lost.agents = agents
        graders = {
            f"reward worker {i}": worker for i, worker in enumerate(self.reward_loop_manager.reward_loop_workers)
        }
        others = graders | transfer_queue_actors(self.config.transfer_queue)
        writes = "file" in trackers(self.config)
        if writes and (said := keep_earlier_metrics(metrics_file(self.config), resumed_at=self.global_steps)):
            print(f"{NOTICE}{said}", flush=True)
        try:
            with RolloutWatchdog(self.actor_rollout_wg.workers, replicas, agents, others):
                super().fit(agent_loop_manager)
        finally:
            self._finish_dumps()
            self._end_of_stop()

    @property
    def _synced_manager(self) -> Any:
        """verl's manager of the replicas that get new weights after every step."""
        return self.llm_server_manager

    def _get_n_gpus_for_throughput(self) -> int:
        return super()._get_n_gpus_for_throughput() + (self.history.own_gpus if self.history is not None else 0)


@register_trainer(TRAINER_MODE)
class SoupTrainer(SoupStages, PPOTrainerSync):
    """On verl's synchronous trainer."""

    # What verl decides by the mode's name (replay buffer, chunk size, checkpoint content) is decided as for `sync`.
    trainer_mode = property(lambda self: "sync", lambda self, value: None)


@register_trainer(ASYNC_TRAINER_MODE)
class SoupColocateAsyncTrainer(SoupStages, PPOTrainerColocateAsync):
    """On verl's trainer with partial rollouts: a response may go on with newer weights than it began with.

    Each token's version is known, so tokens that are older than their step's version are spliced whether they belong to
    a historical prefix or to a response that was interrupted.
    """

    trainer_mode = property(lambda self: "colocate_async", lambda self, value: None)

    def get_llm_client(self) -> VersionedLLMServerClient:
        return cast(VersionedLLMServerClient, self.llm_server_manager.get_client(client_cls=VersionedLLMServerClient))


@register_trainer(SEPARATE_TRAINER_MODE)
class SoupSeparateAsyncTrainer(SoupStages, PPOTrainerSeparateAsync):
    """On verl's trainer beside which the rollout goes on, on GPUs of its own.

    A step makes several updates and then syncs weights once, so a version is a sync, and lags count syncs. verl
    computes the old log-probs of all of a step's updates with the weights of its start, which are those that its
    rollout has: what is older is spliced, as everywhere.
    """

    trainer_mode = property(lambda self: "separate_async", lambda self, value: None)
    standalone_server_manager: Any

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        # verl's own worker does not always copy the weights that it is to put by. A pool's workers are of one class.
        for role in self.role_worker_mapping.keys() - {Role.Critic}:
            self.role_worker_mapping[role] = ray.remote(KeepingActorWorker)

    def _setup(self) -> None:
        # verl hands its log a keyword that only print knows, where no replica shares the trainer's GPUs.
        log = logging.getLogger(PPOTrainerSeparateAsync.__module__)
        level = log.level
        log.setLevel(logging.WARNING)
        try:
            super()._setup()
        finally:
            log.setLevel(level)

    @property
    def _synced_manager(self) -> Any:
        return self.standalone_server_manager  # the others sleep while the trainer works

    def get_llm_client(self) -> VersionedLLMServerClient:
        manager = self.standalone_server_manager
        return cast(VersionedLLMServerClient, manager.get_client(client_cls=VersionedLLMServerClient))
