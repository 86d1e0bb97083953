"""The trainers: look ahead in the data and hand out prefixes. Subclasses of verl's.

verl imports this module right after its own trainers, in the process that runs the training loop.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any, cast

from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.distillation import is_distillation_enabled
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.utils.device import get_device_name

from recipe.soup.names import ASYNC_TRAINER_MODE, REQUESTS_KEY, TRAINER_MODE
from recipe.soup.prefixes.make_source import make_source
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.prefixes.requests import PromptRequests
from recipe.soup.prefixes.snapshot import SNAPSHOT_FOLDER
from recipe.soup.prefixes.source import BANK_FILE, PrefixSource
from recipe.soup.records.metrics_file import keep_earlier_metrics, metrics_file
from recipe.soup.run_settings import run_settings
from recipe.soup.verl_adapter.dump import DumpStage
from recipe.soup.verl_adapter.historical_replicas import HistoricalReplicas
from recipe.soup.verl_adapter.lost_samples import LostSamples
from recipe.soup.verl_adapter.registrations import soup_loss, weigh_decoupled
from recipe.soup.verl_adapter.transfer_queue import fetch
from recipe.soup.verl_adapter.update_stage import UpdateStage
from recipe.soup.verl_adapter.validation import ValidationStage
from verl_ext.health import RolloutWatchdog, handshake, transfer_queue_actors
from verl_ext.versioned_client import VersionedLLMServerClient

CPU_POLL_SECONDS = 0.05
"""verl polls for finished samples every 2 s: most of a step on a laptop, and next to nothing of one on GPUs, where a
poll would also list many more samples."""


class SoupStages(UpdateStage, ValidationStage, DumpStage):
    """One of verl's trainers with a prefix source in front, and SOUP's update (`UpdateStage`).

    With `mixed_share=0` nothing is queued, seeded or spliced, and every step is verl's GRPO step.
    """

    def __init__(self, config: Any) -> None:
        self._visits, self._arrived, self._shown = {}, [], []
        self.settings = run_settings(config)
        rollout, prompts = config.actor_rollout_ref.rollout, config.data.train_batch_size
        self.lost = LostSamples(rollout.n, rollout.n * prompts, self.settings.max_lost_share)
        past_weights = self.settings.mixes and self.settings.source == "snapshot"
        self.history = HistoricalReplicas(config, self.settings) if past_weights else None
        weigh_decoupled(config, self.settings)
        super().__init__(config)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        self._loader_state = self.train_dataloader.state_dict
        rollout = self.config.actor_rollout_ref.rollout
        facts = RunFacts(
            samples=rollout.n,
            response_length=rollout.response_length,
            seed=rollout.seed,
            prompts_per_step=self.config.data.train_batch_size,
            prompts_per_epoch=self.steps_per_epoch * self.config.data.train_batch_size,
            last_step=min(self.total_training_steps, self.steps_per_epoch * self.config.trainer.total_epochs),
        )
        self.source = self._make_source(facts)
        # A checkpoint must resume at the first prompt that was not trained on.
        resume_state = partial(self.source.resume_state, self._loader_state)
        self.train_dataloader.state_dict = resume_state  # pyright: ignore[reportAttributeAccessIssue]

    def _make_source(self, facts: RunFacts) -> PrefixSource:
        model, folder = str(self.config.actor_rollout_ref.model.path), self.history.folder if self.history else None
        return make_source(self.settings, facts, self._fetch_prompts, self.history, model, folder)

    def _build_replay_buffer(self) -> ReplayBuffer:
        replay_buffer = super()._build_replay_buffer()
        self.lost.watch(replay_buffer)
        if get_device_name() == "cpu":
            replay_buffer.poll_interval = CPU_POLL_SECONDS
        clear_groups = replay_buffer._clear_groups

        def harvest_and_clear(partition_id: str, uids: set[str]) -> None:
            # Groups that verl filters out hosted seeds for other prompts, which have nothing to do with the filter.
            tags = replay_buffer.partitions[partition_id]
            keys = [key for key in tags if key.split("_")[0] in uids]
            if partition_id == "train" and keys:
                batch = KVBatchMeta(partition_id=partition_id, keys=keys, tags=[tags[key] for key in keys])
                self._collect_seeds(fetch(batch, ["extra_fields"]), batch.tags)
            for uid in uids:
                self._visits.pop(uid, None)
            clear_groups(partition_id, uids)

        replay_buffer._clear_groups = harvest_and_clear
        sample = replay_buffer.sample

        def sample_and_measure(*args: Any, partition_id: str, **kwargs: Any) -> Any:
            # verl drops validation samples as soon as it has their texts and scores.
            batch, metrics = sample(*args, partition_id=partition_id, **kwargs)
            if partition_id == "val":
                self._measure_surprise(batch)
            return batch, metrics

        replay_buffer.sample = sample_and_measure
        return replay_buffer

    def on_init_end(self) -> None:
        if self.history is not None:
            # Now the current policy's engine sleeps, so a colocated one finds room.
            self.history.start(self)
            if self.global_steps > 0:
                # verl saves a checkpoint before the end of its step, at which this version would have been kept.
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
        replicas = list(self.llm_server_manager.get_replicas()) if vllm else []
        replicas += self.history.replicas if self.history is not None else []
        agents = list(getattr(agent_loop_manager, "agent_loop_workers", []))
        handshake(self.actor_rollout_wg.workers, replicas, agents)
        self.lost.agents = agents
        graders = {
            f"reward worker {i}": worker for i, worker in enumerate(self.reward_loop_manager.reward_loop_workers)
        }
        others = graders | transfer_queue_actors(self.config.transfer_queue)
        if "file" in self.config.trainer.logger:
            keep_earlier_metrics(metrics_file(self.config), resumed_at=self.global_steps)
        try:
            with RolloutWatchdog(self.actor_rollout_wg.workers, replicas, agents, others):
                super().fit(agent_loop_manager)
        finally:
            self._finish_dumps()

    # ------------------------------------------------------------------ prompts, ahead of their time

    def _fetch_prompts(self) -> tuple[TensorDict, list[Any], dict | None]:
        state = self._loader_state() if self.config.trainer.save_freq > 0 else None
        batch = super()._fetch_one_gen_batch()
        return batch, list(cast(Any, batch["raw_prompt"])), state

    def _fetch_one_gen_batch(self) -> TensorDict:
        chunk, prefixes = self.source.take(self.global_steps)
        if self.source.wants_responses:
            visits = enumerate(chunk.messages, start=chunk.first_ordinal)
            self._visits.update(zip(cast(Any, chunk.batch["uid"]), visits, strict=True))
        tu.assign_non_tensor_stack(chunk.batch, REQUESTS_KEY, [PromptRequests(prefixes=slots) for slots in prefixes])
        return chunk.batch

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        batch = super()._next_train_batch(num_prompts)
        if num_prompts is None:  # the step's own batch, not a refill of filtered groups
            self.source.order(self.global_steps, list(cast(Any, batch[REQUESTS_KEY])))
        return batch

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        self.lost.send(batch)
        return super()._submit_batch_to_rollout(batch)

    def on_sample_end(self) -> None:
        super().on_sample_end()
        self.source.generated(self.global_steps)

    def on_step_end(self) -> None:
        # Before the current policy's engine wakes up.
        with marked_timer("snapshot", self.timing_raw):
            self.source.updated(self.global_steps)
        super().on_step_end()

    def _get_n_gpus_for_throughput(self) -> int:
        return super()._get_n_gpus_for_throughput() + (self.history.own_gpus if self.history is not None else 0)

    # ------------------------------------------------------------------ checkpoint

    def _save_checkpoint(self) -> None:
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        # Before verl's part, which ends by declaring the checkpoint complete.
        self.source.save(folder)
        super()._save_checkpoint()
        for outlived in folder.parent.glob(f"global_step_*/{SNAPSHOT_FOLDER}"):
            if not (outlived.parent / "actor").exists():  # verl keeps `max_actor_ckpt_to_keep`
                shutil.rmtree(outlived)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps == 0:
            return
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        if self.config.trainer.resume_mode == "resume_path":
            folder = Path(self.config.trainer.resume_from_path)
        if (folder / BANK_FILE).exists():  # without it `algorithm=soup` was refused at start
            self.source.load(folder)


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
