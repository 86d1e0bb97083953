"""Refuse numbers that are no size, count or probability, under `algorithm=soup`, `grpo` and `verl`.

verl divides by them, or hands them to vLLM or Ray, in a worker, minutes later; and some only make it train nothing.
"""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import refuse

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
VALIDATION = f"{ROLLOUT}.val_kwargs"
OR_NULL = (
    "data.gen_batch_size",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu",
    f"{ACTOR}.ppo_micro_batch_size",
    f"{ACTOR}.ppo_max_token_len_per_gpu",
    f"{ROLLOUT}.max_model_len",
    f"{ROLLOUT}.max_num_seqs",
    f"{ROLLOUT}.max_num_batched_tokens",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu",
    f"{ROLLOUT}.log_prob_micro_batch_size",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.ref.log_prob_micro_batch_size",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",
)
"""Whole numbers from 1, or null: verl then takes something else, or the check that knows when it is needed says so."""
COUNTS = (
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    f"{ACTOR}.ppo_mini_batch_size",
    f"{ACTOR}.ppo_epochs",
    f"{ACTOR}.ulysses_sequence_parallel_size",
    f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size",
    f"{ROLLOUT}.n",
    f"{ROLLOUT}.prompt_length",
    f"{ROLLOUT}.response_length",
    f"{ROLLOUT}.tensor_model_parallel_size",
    f"{ROLLOUT}.data_parallel_size",
    f"{ROLLOUT}.pipeline_model_parallel_size",
    f"{ROLLOUT}.agent.num_workers",
    "reward.num_workers",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units",
    *OR_NULL,
)
"""Whole numbers from 1; some may be null."""
STEPS = ("trainer.total_training_steps", "trainer.total_epochs")


def check_sizes(config: DictConfig) -> None:
    """Check every number that a run divides by, counts with or samples by.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    for key in COUNTS:
        value = OmegaConf.select(config, key, default=1)  # a key that is not there has no effect
        missing = value is None and key in OR_NULL
        if not missing and not (_is_number(value) and isinstance(value, int) and value >= 1):
            raise refuse(key, value, "must be a whole number of 1 or more.")
    trainer = config.trainer
    trains = not (trainer.get("val_only", False) and trainer.get("val_before_train", True))
    for key in STEPS:
        value = OmegaConf.select(config, key)
        if value is None and key == STEPS[0]:  # then epochs say how many
            continue
        if not (_is_number(value) and isinstance(value, int)):
            raise refuse(key, value, "must be a whole number.")
        if trains and value < 1:
            raise refuse(key, value, "verl would train no step; use 1 or more, or trainer.val_only=true.")
    seed = OmegaConf.select(config, f"{ROLLOUT}.seed", default=0)
    if not (_is_number(seed) and isinstance(seed, int) and seed >= 0):
        raise refuse(f"{ROLLOUT}.seed", seed, "must be a whole number of 0 or more.")
    _check_sampling(config)
    rate = OmegaConf.select(config, f"{ACTOR}.optim.lr")
    if not (_is_number(rate) and 0 <= rate < math.inf):
        raise refuse(f"{ACTOR}.optim.lr", rate, "a learning rate is a number of 0 or more, e.g. 1e-6.")


def validates(config: DictConfig) -> bool:
    """Whether the run samples its validation set."""
    return bool(config.trainer.get("val_before_train", True)) or config.trainer.test_freq > 0


def _check_sampling(config: DictConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    if not (_is_number(rollout.temperature) and 0 < rollout.temperature < math.inf):
        why = "greedy tokens have no sampling probability" if rollout.temperature == 0 else "no temperature"
        raise refuse(f"{ROLLOUT}.temperature", rollout.temperature, f"{why}; use a number above 0, e.g. 1.0.")
    share = rollout.gpu_memory_utilization
    if not (_is_number(share) and 0 < share <= 1):
        raise refuse(f"{ROLLOUT}.gpu_memory_utilization", share, "is a share of a GPU; use more than 0, up to 1.")
    _check_truncation(ROLLOUT, rollout)
    if not validates(config):
        return
    n, temperature = rollout.val_kwargs.n, rollout.val_kwargs.temperature
    if not (_is_number(n) and isinstance(n, int) and n >= 1):
        raise refuse(f"{VALIDATION}.n", n, "samples of each validation prompt; use 1 or more.")
    if not (_is_number(temperature) and 0 <= temperature < math.inf):
        raise refuse(f"{VALIDATION}.temperature", temperature, "no temperature; use 0 (greedy) or more.")
    _check_truncation(VALIDATION, rollout.val_kwargs)


def _check_truncation(key: str, sampling: Any) -> None:
    """Check what vLLM asserts of every request, for which verl would lose each sample."""
    if not (_is_number(sampling.top_p) and 0 < sampling.top_p <= 1):
        raise refuse(f"{key}.top_p", sampling.top_p, "is a share of the probability; use more than 0, up to 1.")
    if not (_is_number(sampling.top_k) and isinstance(sampling.top_k, int) and sampling.top_k >= -1):
        raise refuse(f"{key}.top_k", sampling.top_k, "counts tokens; use 1 or more, or -1 for all.")


def _is_number(value: object) -> bool:
    """Also NaN, which is in no interval."""
    return isinstance(value, int | float) and not isinstance(value, bool)
