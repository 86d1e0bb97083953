"""`make gpu-check`: every command for GPUs that the project prints or ships, taken as far as a machine without one can.

Composed as verl composes it; accepted by verl's checks and by ours; what verl's workers would assert there; tokenizer,
dataset and prompt builder on a row; the reward on texts. Models on the hub have a stand-in with the same special
tokens and template, and data that would be downloaded are rows in the prepared columns: the report says where.
"""

import inspect
import json
import random
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from gpu_commands import Workplace, all_commands, write_stand_in
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer

Compose = Callable[..., DictConfig]
MODEL = "actor_rollout_ref.model.path"
THE_USERS = {MODEL: "Qwen/Qwen3-1.7B", "data.train_files": "of_the_user", "data.val_files": "of_the_user"}
"""What a printed command leaves to the user, as `...` or by not naming it."""


# ---------------------------------------------------------------- what verl's workers assert, where they run


def engines_fit(config: DictConfig, model: dict) -> None:
    """verl.workers.engine_workers.ActorRolloutRefWorker.init_model"""
    rollout = config.actor_rollout_ref.rollout
    size = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    assert gpus(config) % size == 0


def replicas_fit_on_nodes(config: DictConfig, model: dict) -> None:
    """verl.workers.rollout.replica.RolloutReplica.__init__"""
    size, per_node = config.actor_rollout_ref.rollout.tensor_model_parallel_size, config.trainer.n_gpus_per_node
    assert size % min(per_node, size) == 0


def all_log_probs_have_the_same_kind_of_batches(config: DictConfig, model: dict) -> None:
    """verl.workers.engine_workers.ActorRolloutRefWorker.init_model"""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert actor.use_dynamic_bsz == rollout.log_prob_use_dynamic_bsz


def ranks_share_a_mini_batch(config: DictConfig, model: dict) -> None:
    """verl.workers.engine_workers.TrainingWorker.train_mini_batch"""
    actor = config.actor_rollout_ref.actor
    assert actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n % ranks(config) == 0


def a_step_is_whole_mini_batches(config: DictConfig, model: dict) -> None:
    """verl.trainer.ppo.v1.trainer_base.PPOTrainer._get_required_batch_multiple"""
    assert config.data.train_batch_size % config.actor_rollout_ref.actor.ppo_mini_batch_size == 0


def fixed_micro_batches_divide(config: DictConfig, model: dict) -> None:
    """verl.workers.engine.utils.prepare_micro_batches"""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if not actor.use_dynamic_bsz:
        assert actor.ppo_mini_batch_size * rollout.n // ranks(config) % actor.ppo_micro_batch_size_per_gpu == 0
        share = config.data.train_batch_size * rollout.n // ranks(config)
        assert share % rollout.log_prob_micro_batch_size_per_gpu == 0


def the_longest_sequence_fits(config: DictConfig, model: dict) -> None:
    """verl.utils.seqlen_balancing.rearrange_micro_batches"""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if actor.use_dynamic_bsz:
        limit = min(actor.ppo_max_token_len_per_gpu, rollout.log_prob_max_token_len_per_gpu)
        assert limit * actor.ulysses_sequence_parallel_size >= longest(config)


def the_model_knows_that_many_positions(config: DictConfig, model: dict) -> None:
    """verl.workers.rollout.vllm_rollout.vllm_async_server.vLLMHttpServer._validate_configs"""
    limit = config.actor_rollout_ref.rollout.max_model_len or model["max_position_embeddings"]
    assert longest(config) <= limit <= model["max_position_embeddings"]


def the_scheduler_has_a_token_for_each_sequence(config: DictConfig, model: dict) -> None:
    """vllm.config.scheduler.SchedulerConfig.verify_max_model_len"""
    rollout = config.actor_rollout_ref.rollout
    assert rollout.max_num_batched_tokens >= rollout.max_num_seqs


def sequence_parallel_is_packed(config: DictConfig, model: dict) -> None:
    """verl.workers.engine.fsdp.transformer_impl.FSDPEngine.__init__"""
    parallel = config.actor_rollout_ref.actor.ulysses_sequence_parallel_size > 1
    assert config.actor_rollout_ref.model.use_remove_padding or not parallel


def fp32_does_not_meet_flash_attention(config: DictConfig, model: dict) -> None:
    """transformers.modeling_utils.PreTrainedModel._flash_attn_can_dispatch"""
    precision = config.actor_rollout_ref.actor.fsdp_config.get("mixed_precision") or {}
    if precision.get("param_dtype") == "fp32":
        assert config.actor_rollout_ref.model.override_config.attn_implementation == "sdpa"


WORKERS = {
    engines_fit: "assert self.world_size % infer_world_size == 0",
    replicas_fit_on_nodes: "assert self.world_size % self.gpus_per_replica_node == 0",
    all_log_probs_have_the_same_kind_of_batches: "use_dynamic_bsz == self.config.rollout.log_prob_use_dynamic_bsz",
    ranks_share_a_mini_batch: "assert mini_batch_size % self.engine.get_data_parallel_size() == 0",
    a_step_is_whole_mini_batches: "math.lcm(required_multiple, actor_global_mini_batch_size)",
    fixed_micro_batches_divide: "assert total_data_size % (force_group_size * micro_batch_size_per_gpu) == 0",
    the_longest_sequence_fits: "assert max_token_len >= max_seq_len",
    the_model_knows_that_many_positions: "self.config.max_model_len > max_position_embeddings",
    the_scheduler_has_a_token_for_each_sequence: "self.max_num_batched_tokens < self.max_num_seqs",
    sequence_parallel_is_packed: "ulysses_sequence_parallel_size > 1 and not self.use_remove_padding",
    fp32_does_not_meet_flash_attention: "only supports torch.float16 and torch.bfloat16 dtypes",
}
"""Each with the words by which the symbol in its docstring says so."""


def gpus(config: DictConfig) -> int:
    return config.trainer.n_gpus_per_node * config.trainer.nnodes


def ranks(config: DictConfig) -> int:
    return gpus(config) // config.actor_rollout_ref.actor.ulysses_sequence_parallel_size


def longest(config: DictConfig) -> int:
    return config.data.max_prompt_length + config.data.max_response_length


@pytest.mark.parametrize("assertion", WORKERS, ids=lambda assertion: assertion.__name__)
def test_it_is_still_what_the_worker_asserts(assertion: Callable[..., None]) -> None:
    symbol = resolve_name(str(assertion.__doc__))
    assert WORKERS[assertion] in inspect.getsource(inspect.unwrap(symbol))


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.mark.parametrize("command", all_commands(), ids=str)
def test_it_would_run(
    command: str,
    workplace: Workplace,
    composed: Compose,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workplace.folder)
    for call in workplace.calls(command):
        record_property("gpu_check", f"{command}: {examine(call, workplace, composed)}")


def examine(call: list[str], workplace: Workplace, composed: Compose) -> str:
    """Take one start of verl as far as a CPU can; returns its batch, and what stood in for the hub."""
    overrides, stand_ins = filled(call, workplace, composed)
    config = composed(*overrides)
    OmegaConf.resolve(config)
    folder = Path(config.actor_rollout_ref.model.path)
    accepted(config)
    model = json.loads((folder / "config.json").read_text())
    for assertion in WORKERS:
        assertion(config, model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = prompt_is_built(config, tokenizer, model["model_type"])
    rewards_differ(config, tokenizer, row, learned=folder.parent == workplace.models)
    gpu = "GPU" if gpus(config) == 1 else "GPUs"
    batch = f"{config.data.train_batch_size} x {config.actor_rollout_ref.rollout.n} samples on {gpus(config)} {gpu}"
    return "; ".join([batch, *stand_ins])


def filled(call: list[str], workplace: Workplace, composed: Compose) -> tuple[list[str], list[str]]:
    """The command with a model and data that are here, and a note of each stand-in."""
    given = dict(override.split("=", 1) for override in call if "=" in override)
    groups = [override for override in call if "." not in override.split("=")[0]]
    known, defaults = composed(*groups), composed()
    # Where the log goes is Hydra's, and not part of what is composed here.
    overrides = [override for override in call if "=..." not in override and not override.startswith("hydra.")]
    notes: list[str] = []
    for key, placeholder in THE_USERS.items():
        value = str(given.get(key, OmegaConf.select(known, key)))
        if value == "..." or value == OmegaConf.select(defaults, key):
            value = placeholder if key == MODEL else str(workplace.data / f"{placeholder}.parquet")
        if key == MODEL and not Path(value).exists():
            value = value.removeprefix(f"{workplace.folder}/")
            notes.append(f"a stand-in for the tokenizer of {value}")
            value = str(write_stand_in(workplace.models, value))
        if Path(value).parent == workplace.data and "one row of data in the prepared columns" not in notes:
            notes.append("one row of data in the prepared columns")
        overrides.append(f"{key}={value}")
    return overrides, notes


def accepted(config: DictConfig) -> None:
    """By verl, before it starts Ray and when a worker reads its part; and by us."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    from recipe.soup.checks.batches import check_batches
    from recipe.soup.checks.config import check_config

    with redirect_stdout(StringIO()):
        validate_config(config, need_reference_policy(config), need_critic(config))
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    check_batches(config)
    if config.algorithm.adv_estimator == "soup":
        check_config(config)


def prompt_is_built(config: DictConfig, tokenizer: Any, model_type: str) -> dict:
    """As verl's dataset and agent loop make it; returns the first row."""
    from verl.trainer.ppo.utils import create_rl_dataset
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    config.data.filter_overlong_prompts = (
        False  # by a process of its own, which takes seconds; lengths are looked at here
    )
    with redirect_stdout(StringIO()):
        for files, train in ((config.data.train_files, True), (config.data.val_files, False)):
            dataset: Any = create_rl_dataset(files, config.data, tokenizer, None, is_train=train, max_samples=4)
            assert len(dataset) > 0
    row = dataset[0]
    builder = create_continuous_token_builder(tokenizer, hf_model_type=model_type)
    token_ids = builder.build_initial_tokens(row["raw_prompt"])
    assert 0 < len(token_ids) <= config.data.max_prompt_length
    assert row["raw_prompt"][-1]["content"] in tokenizer.decode(token_ids)
    return row


def rewards_differ(config: DictConfig, tokenizer: Any, row: dict, learned: bool) -> None:
    """A group whose samples all have one reward teaches nothing; a model that has `learned` is right at times."""
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.reward_score import default_compute_score

    reward: Any = get_custom_reward_fn(config) or default_compute_score
    truth = row["reward_model"]["ground_truth"]
    sampled = [random.Random(i).choices(range(len(tokenizer)), k=32) for i in range(4)]
    texts = [tokenizer.decode(token_ids, skip_special_tokens=True) for token_ids in sampled]
    if learned:
        texts += [f"\\boxed{{{truth}}}", f"#### {truth}", f"{truth}"]
    scores = [reward(row["data_source"], text, truth, row.get("extra_info")) for text in texts]
    values = {score["score"] if isinstance(score, dict) else float(score) for score in scores}
    assert len(values) > 1, f"every response has the reward {values}"
