"""verl's real training worker in this process on a recorded batch: an in-memory TransferQueue, no Ray.

The batch was recorded on the real path (step 5 of a countdown run, lag 2): 64 samples, half of them mixed.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from transformers import AutoTokenizer
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker

from recipe.soup.algorithm.batch import NOBODY
from recipe.soup.names import SAMPLED_KEY, VISIT_KEY
from recipe.soup.prefixes.finished import fingerprint
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.verl_adapter.trainer import SoupStages

RECORDED = Path(__file__).parents[1] / "data" / "recorded_batch.jsonl"
BASE_MODEL = Path(__file__).parents[2] / "examples/countdown/base_model"
STEP = 5
LAST_STEP = 14
COUNTDOWN = (
    "hardware=cpu",
    "example=countdown",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    # Fixed micro-batches, so that tests choose how a mini-batch is split.
    "actor_rollout_ref.actor.use_dynamic_bsz=false",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32",
)
ENTERING = ["input_ids", "position_ids", "response_mask", "loss_mask", "old_log_probs", "advantages", "responses"]


class Store:
    """TransferQueue's key-value calls over a dictionary."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.tags: dict[str, dict[str, Any]] = {}
        self.types: dict[tuple[str, str], torch.dtype] = {}

    def put(self, keys: list[str], partition_id: str, fields: Any = None, tags: Any = None) -> KVBatchMeta:
        for i, key in enumerate(keys):
            row = self.rows.setdefault(key, {})
            for name, value in fields.items() if fields is not None else ():
                if isinstance(value, torch.Tensor):
                    kept = self.types.setdefault((partition_id, name), value.dtype)
                    assert kept == value.dtype, f"TransferQueue keeps {name} as {kept} and refuses {value.dtype}"
                item = value[i] if isinstance(value, torch.Tensor) else list(value)[i]
                row[name] = item.clone() if isinstance(item, torch.Tensor) else getattr(item, "data", item)
        self.tags.update(zip(keys, tags or [], strict=bool(tags)))
        return KVBatchMeta(
            partition_id=partition_id, keys=keys, tags=[self.tags.get(key, {}) for key in keys], extra_info={}
        )

    def get(self, keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> TensorDict:
        names = [n for n in (select_fields or self.rows[keys[0]]) if all(n in self.rows[key] for key in keys)]
        data = TensorDict({}, batch_size=[len(keys)])
        for name in names:
            values: Any = [self.rows[key][name] for key in keys]
            if isinstance(values[0], torch.Tensor):
                data[name] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
            else:
                tu.assign_non_tensor_stack(data, name, values)
        return data


class WorkerGroup:
    """verl's real actor worker in this process, called as a Ray worker group would call it."""

    def __init__(self, config: DictConfig, store: Store, cls: Any = ActorRolloutRefWorker) -> None:
        self.worker: Any = cls(config=copy.deepcopy(config.actor_rollout_ref), role="actor")
        self.worker.init_model()
        self.store = store
        self.entered: list[dict[str, torch.Tensor]] = []

    def _data(self, batch: KVBatchMeta) -> Any:
        data = self.store.get(batch.keys, str(batch.partition_id))
        for key, value in (batch.extra_info or {}).items():
            tu.assign_non_tensor_data(data, key, value)
        return data

    def set_loss_fn(self, loss_fn: Any) -> None:
        self.worker.set_loss_fn(loss_fn)

    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        output = self.worker.compute_log_prob(self._data(batch))
        tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
        self.store.put(batch.keys, str(batch.partition_id), TensorDict(tensors, batch_size=len(batch)))
        return batch

    def update_actor(self, batch: KVBatchMeta) -> TensorDict:
        data = self._data(batch)
        self.entered.append({name: data[name].values().clone() for name in ENTERING})
        return self.worker.update_actor(data)

    def parameters(self) -> dict[str, torch.Tensor]:
        module = self.worker.actor.engine.module
        return {name: tensor.full_tensor().clone() for name, tensor in module.state_dict().items()}


class StillWorkers:
    """A worker group whose log-probs are zeros: enough for the splice."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        for key in batch.keys:
            zeros = torch.zeros(len(self.store.rows[key]["input_ids"]))
            self.store.rows[key].update(log_probs=zeros, entropy=zeros.clone())
        return batch


def recorded(store: Store, rows: slice = slice(None)) -> KVBatchMeta:
    """Put the recorded samples into the store, as verl's agent loops do."""
    lines = [json.loads(line) for line in RECORDED.read_text().splitlines()][rows]
    tags = []
    for line in lines:
        prompts, responses = torch.tensor(line["prompt_ids"]), torch.tensor(line["response_ids"])
        input_ids, mask = torch.cat([prompts, responses]), torch.ones_like(responses)
        scores = torch.zeros(len(responses))
        scores[-1] = line["score"]
        store.rows[line["uid"]] = {
            "prompts": prompts,
            "responses": responses,
            "input_ids": input_ids,
            "position_ids": torch.arange(len(input_ids)),
            "response_mask": mask,
            "loss_mask": mask.clone(),
            "rollout_log_probs": torch.tensor(line["old_log_probs"]),
            "rm_scores": scores,
            "policy_versions": torch.tensor(line["policy_versions"]),
            "uid": line["uid"].rsplit("_", 2)[0],
            "extra_fields": {SAMPLED_KEY: [], "reward_extra_info": {}},
            "num_turns": 2,
        }
        versions = {"global_steps": STEP, "min_global_steps": 0, "max_global_steps": STEP - 1}
        tags.append({"seq_len": len(input_ids), **versions})
    return store.put([line["uid"] for line in lines], "train", tags=tags)


def visits(store: Store, of: dict[str, tuple[int, Any]]) -> None:
    """Note the place in the order of training, and the chat messages, of prompts by uid."""
    for row in store.rows.values():
        if row["uid"] in of:
            ordinal, messages = of[row["uid"]]
            row[VISIT_KEY] = {"ordinal": ordinal, "prompt": fingerprint(messages)}


def with_tools(store: Store) -> None:
    """Have a tool write two tokens of each sample: behind its prefix, and behind its fifth token at the earliest."""
    for row in store.rows.values():
        first = max(int((row["policy_versions"] < STEP - 1).sum()), 5)
        answer = slice(first, first + 2)
        row["policy_versions"][answer] = NOBODY
        row["rollout_log_probs"][answer] = 0
        for mask in ("response_mask", "loss_mask"):
            row[mask][answer] = 0


def as_demonstrations(store: Store) -> None:
    """Have the prefixes come from a data set: nobody knows who wrote them."""
    for row in store.rows.values():
        shown = row["policy_versions"] < STEP - 1
        row["policy_versions"][shown] = NOBODY
        row["rollout_log_probs"][shown] = 0


def make_trainer(cls: Any, config: DictConfig, group: Any = None, loader: Any = None) -> Any:
    """One of verl's trainers as it is made, up to the point at which it starts Ray's workers.

    Args:
        loader: what training prompts are read from.
    """
    trainer = cls(config)
    trainer.global_steps = STEP
    trainer.actor_rollout_wg = group
    trainer.tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    trainer.train_dataloader, trainer.train_dataloader_it = loader or SimpleNamespace(state_dict=dict), None
    trainer._init_dump_executor()
    if issubclass(cls, SoupStages):
        rollout = config.actor_rollout_ref.rollout
        trainer._read_ahead(RunFacts(rollout.n, rollout.response_length, 0, config.data.train_batch_size, LAST_STEP))
    return trainer


def update(
    cls: type,
    config: DictConfig,
    store: Store,
    loss: bool,
    mixed: bool,
    tools: bool = False,
    demonstrations: bool = False,
) -> tuple[WorkerGroup, dict]:
    """One update from the base model on the recorded batch."""
    torch.manual_seed(0)
    group = WorkerGroup(config, store)
    trainer = make_trainer(cls, config, group)
    batch = recorded(store)
    if not mixed:
        for row in store.rows.values():
            row["policy_versions"] = torch.full_like(row["policy_versions"], STEP - 1)
    if tools:
        with_tools(store)
    if demonstrations:
        as_demonstrations(store)
    if loss:
        trainer._install_loss()
    metrics: dict = {}
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)
    trainer._update_actor(batch, metrics)
    return group, metrics
