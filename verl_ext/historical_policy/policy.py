"""The historical policy: rollout replicas of its own, which serve past weights."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from typing import Any, cast
from uuid import uuid4

import ray
from omegaconf import DictConfig, OmegaConf
from verl.checkpoint_engine.base import CheckpointEngineWorker
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.single_controller.ray.base import RayResourcePool, split_resource_pool
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.rl_dataset import get_dataset_class
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import RolloutReplica, TokenOutput, get_rollout_replica_class

from verl_ext.historical_policy.snapshots import Snapshot


class HistoricalPolicy:
    """Samples with any weights of the trained policy's architecture, by replicas of its own.

    Weights never pass through the current policy's engine. Calls are carried out one after another in a separate
    thread, so `sample` returns at once.

    Args:
        config: verl's whole config, after `use_snapshots`; it sets model, rollout and sampling parameters as for the
            current policy.
        first_rank: rank of the first replica; the current policy's replicas have the ranks below.
        placement: `standalone` on GPUs of its own, or `colocated` on those of `pool`, where the engine sleeps
            (`rollout.free_cache_engine`) whenever it does not sample.
        n_gpus: number of GPUs of a `standalone` policy, a multiple of one replica's; `colocated` uses the whole pool.
        pool: resource pool of the training workers, for `colocated`.
        overrides: keys of `actor_rollout_ref.rollout` in which the engine differs from the current policy's, such as
            `gpu_memory_utilization`.
    """

    def __init__(
        self,
        config: DictConfig,
        first_rank: int,
        placement: str = "standalone",
        n_gpus: int | None = None,
        pool: RayResourcePool | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self._config, self._placement = config, placement
        rollout = config.actor_rollout_ref.rollout
        engine: Any = OmegaConf.merge(rollout, dict(overrides or {}))
        size = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
        self._pools = split_resource_pool(pool, size) if placement == "colocated" and pool is not None else []
        count = len(self._pools) or (n_gpus or size) // size
        replica_class = get_rollout_replica_class(rollout.name)
        self.replicas: list[RolloutReplica] = [
            replica_class(
                replica_rank=first_rank + i,
                config=engine,
                model_config=config.actor_rollout_ref.model,
                gpus_per_node=config.trainer.n_gpus_per_node,
            )
            for i in range(count)
        ]
        # A standalone engine never sleeps; a colocated one does not either where nothing may sleep (no CUDA).
        self._sleeps = placement == "colocated" and bool(rollout.free_cache_engine)
        self._loaded: Snapshot | None = None
        self._tokenizing: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="historical-policy")

    def start(self) -> None:
        """Launch the replicas, as slowly as the current policy's. Colocated ones need the current policy asleep."""
        model: HFModelConfig = omega_conf_to_dataclass(self._config.actor_rollout_ref.model)
        self._tokenizing = {
            "tokenizer": model.tokenizer,
            "processor": model.processor,
            "hf_model_type": getattr(model.hf_config, "model_type", None),
            "dataset_cls": get_dataset_class(self._config.data),
        }
        self._thread.submit(asyncio.run, self._start()).result()

    async def _start(self) -> None:
        if self._placement == "colocated":
            await asyncio.gather(
                *(replica.init_colocated(pool) for replica, pool in zip(self.replicas, self._pools, strict=True))
            )
            await self._rest()
        else:
            await asyncio.gather(*(replica.init_standalone() for replica in self.replicas))

    async def _rest(self) -> None:
        if self._sleeps:
            await asyncio.gather(*(replica.sleep() for replica in self.replicas))

    def sample(
        self, snapshot: Snapshot, prompts: Sequence[Any], max_tokens: Sequence[int]
    ) -> "Future[list[TokenOutput | None]]":
        """Sample one response to each prompt with the snapshot's weights, at the run's own sampling parameters.

        Args:
            snapshot: the weights; they are loaded first, unless they were the last ones in use.
            prompts: chat messages of each prompt; they are tokenised as verl's agent loops do.
            max_tokens: limit of the response to each prompt.

        Returns:
            a future with one answer for each prompt, in order: token ids and their log-probs, with the snapshot's
            version in `extra_fields["global_steps"]`; None where the engine gave none. It fails if every request did.
        """
        return self._thread.submit(asyncio.run, self._sample(snapshot, list(prompts), list(max_tokens)))

    async def _sample(self, snapshot: Snapshot, prompts: list[Any], max_tokens: list[int]) -> list[TokenOutput | None]:
        # Wait for shards that are still being written before the engine wakes.
        plain = replace(snapshot, shards=tuple(snapshot.shards))
        try:
            if self._sleeps:
                await asyncio.gather(*(replica.wake_up() for replica in self.replicas))
            if plain != self._loaded:
                await self._load(plain)
            answers = await self._generate(await self._prompt_ids(prompts), max_tokens)
        finally:
            await self._rest()
        if answers and all(isinstance(answer, BaseException) for answer in answers):
            raise cast(BaseException, answers[0])
        return [answer if isinstance(answer, TokenOutput) and answer.token_ids else None for answer in answers]

    async def _generate(self, prompt_ids: list[list[int]], max_tokens: list[int]) -> list[Any]:
        servers = cycle([replica.server_handle for replica in self.replicas])
        requests = (
            next(servers).generate.remote(
                prompt_ids=ids,
                sampling_params={**self._sampling_params(), "max_tokens": tokens},
                request_id=uuid4().hex,
            )
            for ids, tokens in zip(prompt_ids, max_tokens, strict=True)
        )
        return await asyncio.gather(*requests, return_exceptions=True)

    async def _load(self, snapshot: Snapshot) -> None:
        """Stream the weights into every replica, after which verl's server drops its prefix cache."""
        workers = [worker for replica in self.replicas for worker in replica.workers]
        group: Any = RayWorkerGroup(
            worker_handles=workers, ray_cls_with_init=RayClassWithInitArgs(cls=ray.remote(CheckpointEngineWorker))
        )
        await asyncio.gather(
            *group.execute_checkpoint_engine(["point_at"] * len(workers), snapshot=[snapshot] * len(workers))
        )
        self._loaded = None
        await asyncio.gather(*group.update_weights(global_steps=snapshot.version))
        await asyncio.gather(*group.execute_checkpoint_engine(["finalize"] * len(workers)))
        self._loaded = snapshot

    def _sampling_params(self) -> dict[str, Any]:
        # verl's agent-loop workers build them like this for training.
        rollout = self._config.actor_rollout_ref.rollout
        return {
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "repetition_penalty": 1.0,
            "logprobs": True,
        }

    async def _prompt_ids(self, prompts: list[Any]) -> list[list[int]]:
        """Tokenise the prompts as verl's own agent loop does, each only once."""
        make: Any = SingleTurnAgentLoop
        agent_loop = make(  # it is bound to the running event loop, so it cannot be kept
            trainer_config=DictConfigWrap(self._config),
            data_config=DictConfigWrap(self._config.data),
            server_manager=None,
            **self._tokenizing,
        )
        made: dict[int, list[int]] = {}
        for messages in prompts:
            if id(messages) not in made:
                made[id(messages)] = await agent_loop.ct_build_initial_tokens(list(messages))
        return [made[id(messages)] for messages in prompts]
