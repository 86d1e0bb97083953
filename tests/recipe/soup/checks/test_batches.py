"""Batches that verl's workers would stumble over, and groups in which nothing can be compared."""

from collections.abc import Callable

import pytest
from omegaconf import DictConfig
from refusals import sentence

from recipe.soup.checks.batches import MICRO_BATCHES, check_batches, check_groups

Compose = Callable[..., DictConfig]
ACTOR, REF, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "ref", "rollout"))
FIXED = f"{ACTOR}.use_dynamic_bsz=false {ACTOR}.ppo_micro_batch_size_per_gpu=4"
BATCH = f"data.train_batch_size=16 {ACTOR}.ppo_mini_batch_size=8"
"""Of 8 samples each, on 8 GPUs."""
PACKED, PADDED = (f"actor_rollout_ref.model.use_remove_padding={packs}" for packs in ("true", "false"))

every = pytest.mark.parametrize("algorithm", ["soup", "grpo", "verl"])


@pytest.mark.parametrize(
    ("algorithm", "pass_k", "refused"),
    [("soup", "9", "soup.pass_k=9: choose 1 to"), ("grpo", "0", "soup.pass_k=0"), ("verl", "", "only algorithm=soup")],
)
def test_pass_at_k_draws_from_a_prompts_samples(composed: Compose, algorithm: str, pass_k: str, refused: str) -> None:
    k = [f"algorithm.soup.pass_k={pass_k}"] if pass_k else []
    with pytest.raises(SystemExit) as refusal:
        check_groups(composed(f"algorithm={algorithm}", "algorithm.adv_estimator=pass_at_k", *k))
    assert refused in str(refusal.value)


@every
def test_what_the_groups_bring_is_accepted(composed: Compose, algorithm: str) -> None:
    check_batches(composed(f"algorithm={algorithm}"))
    check_batches(composed(f"algorithm={algorithm}", "hardware=cpu", "example=countdown"))


@every
@pytest.mark.parametrize(
    ("overrides", "refused", "advice"),
    [
        # Groups.
        ("", f"{ROLLOUT}.n=1", "use 2 or more"),
        ("algorithm.adv_estimator=rloo", f"{ROLLOUT}.n=1", "adv_estimator=rloo"),
        ("", f"{ROLLOUT}.full_determinism=True", "set it to False"),
        # Mini-batches.
        ("data.train_batch_size=16", f"{ACTOR}.ppo_mini_batch_size=32", "a divisor of data.train_batch_size=16"),
        ("data.train_batch_size=16", f"{ACTOR}.ppo_mini_batch_size=6", "a divisor of data.train_batch_size=16"),
        (f"{FIXED} data.train_batch_size=16", f"{ACTOR}.ppo_mini_batch_size=6", "a divisor of"),
        (f"{BATCH} trainer.n_gpus_per_node=6", f"{ACTOR}.ppo_mini_batch_size=8", "64 samples (x rollout.n=8)"),
        (f"{BATCH} {ROLLOUT}.n=4 trainer.nnodes=8", f"{ACTOR}.ppo_mini_batch_size=8", "over 64 data-parallel ranks"),
        # Sizes of micro-batches.
        *(("", f"{key}=16", f"{ACTOR}.ppo_max_token_len_per_gpu=16384") for key in MICRO_BATCHES),
        (f"{FIXED} {BATCH}", f"{ACTOR}.ppo_micro_batch_size_per_gpu=3", "8 samples of a rank"),
        (f"{FIXED} {BATCH}", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=32", "16 samples of a rank"),
        ("", f"{ROLLOUT}.log_prob_use_dynamic_bsz=False", "use_dynamic_bsz=True"),
        # Room for the longest sequence.
        ("", f"{ACTOR}.ppo_max_token_len_per_gpu=1000", "may have 1024 tokens"),
        ("", f"{ROLLOUT}.log_prob_max_token_len_per_gpu=1000", "may have 1024 tokens"),
        ("", f"{REF}.log_prob_max_token_len_per_gpu=1000", "may have 1024 tokens"),
        ("hardware=cpu example=countdown", f"{ACTOR}.ppo_max_token_len_per_gpu=64", "128"),
        ("", f"{ROLLOUT}.max_model_len=1000", "1024 or more"),
        (f"{FIXED} {BATCH}", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=null", "a rank has 16 samples"),
        (
            f"{FIXED} {BATCH} {ROLLOUT}.log_prob_micro_batch_size_per_gpu=4 {ACTOR}.use_kl_loss=true",
            f"{REF}.log_prob_micro_batch_size_per_gpu=3",
            "16 samples of a rank",
        ),
        # Fetches.
        (BATCH, "data.gen_batch_size=32", "a divisor of data.train_batch_size=16"),
        (BATCH, "data.gen_batch_size=6", "a divisor of data.train_batch_size=16"),
        ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=null", "by a metric"),
        # GPUs.
        ("trainer.n_gpus_per_node=1", f"{ROLLOUT}.tensor_model_parallel_size=2", "over 1 x 1 GPUs"),
        ("trainer.n_gpus_per_node=4", f"{ROLLOUT}.tensor_model_parallel_size=8", "over 1 x 4 GPUs"),
        ("trainer.n_gpus_per_node=4 trainer.nnodes=3", f"{ROLLOUT}.tensor_model_parallel_size=6", "over 3 x 4 GPUs"),
        (f"{ROLLOUT}.data_parallel_size=3", f"{ROLLOUT}.tensor_model_parallel_size=2", "engine of 6 GPUs"),
        ("", f"{ACTOR}.ulysses_sequence_parallel_size=3", "divide the 8 GPUs"),
        (PADDED, f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2", "flash-attn"),
        (f"{ROLLOUT}.max_num_batched_tokens=512", f"{ROLLOUT}.max_num_seqs=1024", "max_num_batched_tokens=512"),
    ],
)
def test_refused(composed: Compose, algorithm: str, overrides: str, refused: str, advice: str) -> None:
    text = sentence(check_batches, composed(f"algorithm={algorithm}", *overrides.split(), refused))
    assert text.startswith(f"{refused.replace('null', 'None')}: ")
    assert advice in text


@every
@pytest.mark.parametrize(
    "overrides",
    [
        f"{ROLLOUT}.n=2",
        f"{ROLLOUT}.n=1 algorithm.adv_estimator=reinforce_plus_plus",
        f"{ROLLOUT}.n=1 algorithm.adv_estimator=of_the_users_own",
        f"{BATCH} {FIXED} {ROLLOUT}.log_prob_micro_batch_size_per_gpu=16",
        f"{BATCH} {ROLLOUT}.n=4 trainer.nnodes=4",
        f"{ACTOR}.ppo_max_token_len_per_gpu=1024 {ROLLOUT}.max_model_len=1024",
        f"{ACTOR}.ppo_max_token_len_per_gpu=512 {ACTOR}.ulysses_sequence_parallel_size=2",
        f"{PACKED} {ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2",
        f"{PADDED} {ACTOR}.fsdp_config.ulysses_sequence_parallel_size=1",
        f"trainer.n_gpus_per_node=4 trainer.nnodes=2 {ROLLOUT}.tensor_model_parallel_size=8",
        f"{ROLLOUT}.max_num_batched_tokens=512 {ROLLOUT}.max_num_seqs=512",
        f"{BATCH} data.gen_batch_size=4",
        f"{BATCH} data.gen_batch_size=32 algorithm.filter_groups.enable=true",
        f"{BATCH} data.gen_batch_size=32 trainer.v1.sampler.sync_refill_failed_groups=true",
        # What other engines share out, and how, is theirs.
        f"model_engine=megatron {BATCH} trainer.n_gpus_per_node=6",
        "model_engine=veomni",
        "model_engine=torchtitan",
    ],
)
def test_not_refused(composed: Compose, algorithm: str, overrides: str) -> None:
    check_batches(composed(f"algorithm={algorithm}", *overrides.split()))


@pytest.mark.parametrize(
    ("engine", "strategy"),
    [("dp", "fsdp2"), ("megatron", "megatron"), ("veomni", "veomni"), ("torchtitan", "torchtitan")],
)
@every
def test_a_chosen_engine_keeps_its_strategy(composed: Compose, algorithm: str, engine: str, strategy: str) -> None:
    model = composed(f"algorithm={algorithm}", f"model_engine={engine}").actor_rollout_ref
    assert (model.actor.strategy, model.ref.strategy) == (strategy, strategy)
    if engine != "dp":
        assert composed(f"model_engine={engine}").actor_rollout_ref.actor.strategy == strategy  # verl's own
    assert composed(f"algorithm={algorithm}", f"{ACTOR}.strategy=fsdp").actor_rollout_ref.actor.strategy == "fsdp"
