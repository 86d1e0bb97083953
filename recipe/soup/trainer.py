"""The trainer side: looks ahead in the data, hands out prefixes, and splices behaviour log-probs. Subclass of verl's.

verl imports this module right after its own trainers, in the process that runs the training loop.
"""

from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass

from recipe.soup.agent_loop import ORDERS_KEY, SEEDS_KEY
from recipe.soup.algorithm import soup_loss
from recipe.soup.lookahead import Chunk, LookaheadQueue
from recipe.soup.metrics import TrainRows, means_of_loss_sums, train_metrics
from recipe.soup.orders import PromptOrders, Seed, SeedOrder
from recipe.soup.prefixes import PrefixBank, plan_lengths
from recipe.soup.ratios import prefix_mask, splice_behavior_log_probs
from recipe.soup.refusals import BANK_FILE, TRAINER_MODE
from recipe.soup.rows import fetch, padded, sample_columns, store, without_padding
from recipe.soup.settings import parse_settings
from verl_ext.health import RolloutWatchdog, handshake

TRAIN_FIELDS = [
    "response_mask",
    "old_log_probs",
    "rollout_log_probs",
    "policy_versions",
    "rm_scores",
    "entropy",
    "uid",
    "extra_fields",
]
SEED_COST = ("requests", "arrived", "tokens", "ended")
POLL_SECONDS = 0.05
"""verl polls for finished samples every 2 s, which is most of a small step; a poll costs a millisecond."""


@register_trainer(TRAINER_MODE)
class SoupTrainer(PPOTrainerSync):
    """verl's synchronous trainer with a lookahead queue in front and the splice in the middle.

    With `mixed_share=0` nothing is queued, seeded or spliced, and every step is verl's GRPO step.
    """

    # What verl decides by the mode's name (replay buffer, chunk size, checkpoint content) is decided as for `sync`.
    trainer_mode = property(lambda self: "sync", lambda self, value: None)

    def __init__(self, config: Any) -> None:
        self.settings = parse_settings(config.algorithm.get("soup"), config.data.max_response_length)
        self.bank = PrefixBank()
        self._next_ordinal = 0
        self._seed_cost = dict.fromkeys(SEED_COST, 0)
        self._dumped_partition: str | None = None
        super().__init__(config)

    def _build_replay_buffer(self) -> ReplayBuffer:
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = POLL_SECONDS
        clear_groups = replay_buffer._clear_groups

        def harvest_and_clear(partition_id: str, uids: set[str]) -> None:
            # Groups that verl filters out hosted seeds for other prompts, which have nothing to do with the filter.
            tags = replay_buffer.partitions[partition_id]
            keys = [key for key in tags if key.split("_")[0] in uids]
            if partition_id == "train" and keys:
                batch = KVBatchMeta(partition_id=partition_id, keys=keys, tags=[tags[key] for key in keys])
                self._harvest(fetch(batch, ["extra_fields"]), batch.tags)
            clear_groups(partition_id, uids)

        replay_buffer._clear_groups = harvest_and_clear
        return replay_buffer

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        epochs_end = self.steps_per_epoch * self.config.trainer.total_epochs
        self.queue = LookaheadQueue(
            lag=self.settings.lag if self.settings.mixed_share > 0 else 0,
            warm_start=self.settings.warm_start,
            prompts_per_step=self.config.data.train_batch_size,
            last_step=min(self.total_training_steps, epochs_end),
        )
        # A checkpoint must resume at the first prompt that was not trained on, not at the last one looked at.
        self._loader_state = self.train_dataloader.state_dict
        self.train_dataloader.state_dict = self._state_of_next_prompt  # pyright: ignore[reportAttributeAccessIssue]

    def on_init_end(self) -> None:
        super().on_init_end()
        self._install_loss()
        replicas = self.llm_server_manager.get_replicas()
        handshake(self.actor_rollout_wg, replicas)
        self._watchdog = RolloutWatchdog(self.actor_rollout_wg, replicas)

    def _install_loss(self) -> None:
        actor_config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(soup_loss, config=actor_config))

    def fit(self, agent_loop_manager: Any) -> None:
        with self._watchdog:
            super().fit(agent_loop_manager)

    # ------------------------------------------------------------------ prompts, ahead of their time

    def _fetch_chunk(self) -> Chunk:
        state = self._loader_state() if self.config.trainer.save_freq > 0 else None
        batch = super()._fetch_one_gen_batch()
        chunk = Chunk(batch, len(batch), self._next_ordinal, state)
        self._next_ordinal += chunk.size
        return chunk

    def _fetch_one_gen_batch(self) -> TensorDict:
        chunk = self.queue.pop() or self._fetch_chunk()
        prefixes = [self.bank.take(chunk.first_ordinal + row) for row in range(chunk.size)]
        if not self.queue.mixes(self.global_steps):  # a refill came upon a later step's prompts
            prefixes = [{} for _ in prefixes]
        tu.assign_non_tensor_stack(chunk.batch, ORDERS_KEY, [PromptOrders(prefixes=slots) for slots in prefixes])
        return chunk.batch

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        batch = super()._next_train_batch(num_prompts)
        if num_prompts is None:  # the step's own batch, not a refill of filtered groups
            self.queue.top_up(self.global_steps, self._fetch_chunk)
            self._order_seeds(batch)
        return batch

    def _lengths(self, ordinal: int) -> list[int]:
        """Prefix lengths of the prompt at this place in the data, one for each of its mixed samples."""
        rollout = self.config.actor_rollout_ref.rollout
        settings = self.settings
        return plan_lengths(settings.prefix_length, settings.mixed_share, rollout.n, rollout.seed, ordinal)

    def _order_seeds(self, batch: TensorDict) -> None:
        """Spread the prefixes that are due over this batch's samples, one future prompt to a sample."""
        samples = range(self.config.actor_rollout_ref.rollout.n)
        rows: list[PromptOrders] = list(cast(Any, batch[ORDERS_KEY]))
        hosts = cycle((orders, sample) for sample in samples for orders in rows)
        for chunk, row in self.queue.due(self.global_steps):
            ordinal = chunk.first_ordinal + row
            present = self.bank.slots(ordinal)
            missing = {slot: n for slot, n in enumerate(self._lengths(ordinal)) if slot not in present}
            if missing:
                orders, sample = next(hosts)
                order = SeedOrder(ordinal, chunk.batch["raw_prompt"][row], missing, self.settings.on_eos)
                orders.seeds.setdefault(sample, []).append(order)
                self._seed_cost["requests"] += len(missing)

    # ------------------------------------------------------------------ the update

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(batch, metrics)
        data = fetch(batch, TRAIN_FIELDS)
        self._harvest(data, batch.tags)
        rows = self._train_rows(data)
        metrics.update(train_metrics(rows))
        metrics.update(self._cost_metrics())
        old_log_probs = splice_behavior_log_probs(rows.current_log_probs, rows.behavior_log_probs, rows.prefix)
        store(batch, data["response_mask"], old_log_probs=old_log_probs, prefix_mask=rows.prefix.to(torch.int64))
        return batch

    def _train_rows(self, data: Any) -> TrainRows:
        width = int(data["response_mask"].offsets().diff().max())
        response_mask = padded(data["response_mask"], width).bool()
        versions = padded(data["policy_versions"], width)
        current = self.global_steps - 1
        old_log_probs = padded(data["old_log_probs"], width)
        return TrainRows(
            response_mask=response_mask,
            prefix=prefix_mask(versions, response_mask, current),
            policy_versions=versions,
            behavior_log_probs=padded(data["rollout_log_probs"], width),
            current_log_probs=old_log_probs,
            # verl's bypass_mode has no trainer forward, hence no entropy.
            entropy=padded(data["entropy"], width) if "entropy" in data else torch.zeros_like(old_log_probs),
            rewards=padded(data["rm_scores"], width).sum(dim=1),
            uids=list(data["uid"]),
            current_version=current,
        )

    def _harvest(self, data: Any, tags: list[dict]) -> None:
        """Move the prefixes that this batch's samples left into the bank."""
        front = self.queue.front
        for extra, tag in zip(data["extra_fields"], tags, strict=True):
            if tag.get("is_padding", False):
                continue  # verl's padding rows repeat the first sample's extra fields
            extra = getattr(extra, "data", extra)
            for seed in map(Seed.unpack, extra[SEEDS_KEY]):
                self._seed_cost["arrived"] += 1
                self._seed_cost["tokens"] += seed.prefix.sampled
                self._seed_cost["ended"] += seed.prefix.ended
                if front is not None and seed.ordinal >= front.first_ordinal:
                    self.bank.put(seed.ordinal, seed.slot, seed.prefix)

    def _cost_metrics(self) -> dict[str, float]:
        cost, self._seed_cost = self._seed_cost, dict.fromkeys(SEED_COST, 0)
        return {
            "soup/cost/seed_requests": cost["requests"],
            "soup/cost/seed_tokens": cost["tokens"],
            "soup/cost/seeds_lost": cost["requests"] - cost["arrived"],
            "soup/cost/seeds_ended": cost["ended"],
            "soup/bank/prefixes": len(self.bank),
            "soup/bank/bytes": self.bank.nbytes,
            "soup/queue/prompts": len(self.queue),
        }

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        prefix = "actor/soup/loss/"
        sums = {key.removeprefix("actor/"): metrics.pop(key) for key in list(metrics) if key.startswith(prefix)}
        metrics.update(means_of_loss_sums(sums))
        return batch

    # ------------------------------------------------------------------ dump and checkpoint

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        self._dumped_partition = str(batch.partition_id)
        super()._log_rollout_data(without_padding(batch), timing_raw, rollout_data_dir)
        self._dumped_partition = None

    def _dump_generations(self, *args: Any, reward_extra_infos_dict: dict, **kwargs: Any) -> None:
        # verl also comes here with validation samples, which have no columns of ours.
        if self._dumped_partition is not None:
            columns = sample_columns(reward_extra_infos_dict["uid"], self._dumped_partition)
            reward_extra_infos_dict = {**reward_extra_infos_dict, **columns}
        super()._dump_generations(*args, reward_extra_infos_dict=reward_extra_infos_dict, **kwargs)

    def _state_of_next_prompt(self) -> dict:
        front = self.queue.front
        return self._loader_state() if front is None else front.resume_state

    def _save_checkpoint(self) -> None:
        front = self.queue.front
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        # Before verl's part, which ends by declaring the checkpoint complete.
        self.bank.save(folder / BANK_FILE, self._next_ordinal if front is None else front.first_ordinal)
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps == 0:
            return
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        if self.config.trainer.resume_mode == "resume_path":
            folder = Path(self.config.trainer.resume_from_path)
        if (folder / BANK_FILE).exists():  # without it `algorithm=soup` was refused at start
            self.bank, self._next_ordinal = PrefixBank.load(folder / BANK_FILE)
