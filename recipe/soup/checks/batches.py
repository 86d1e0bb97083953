"""Refuse batches that cannot be formed, at start, under `algorithm=soup`, `grpo` and `verl`.

verl checks these in its workers, minutes later, or never. What verl itself refuses at start is left to it.
"""

from omegaconf import DictConfig, OmegaConf

from recipe.soup.checks.losses import ESTIMATORS
from recipe.soup.errors import refuse
from verl_ext.placement import is_separate

ACTOR = "actor_rollout_ref.actor"
REF = "actor_rollout_ref.ref"
ROLLOUT = "actor_rollout_ref.rollout"
GROUP_ESTIMATORS = (*ESTIMATORS, "gdpo", "optimal_token_baseline", "tir_optimal_token_baseline")
"""verl's estimators that compare a sample with its group; what a user's own compares is not known."""
PADDING_ROW = 128
"""Tokens in each of the rows with which verl fills up a batch that lacks samples."""
MICRO_BATCHES = (
    f"{ACTOR}.ppo_micro_batch_size_per_gpu",
    f"{ACTOR}.ppo_micro_batch_size",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu",
    f"{ROLLOUT}.log_prob_micro_batch_size",
    f"{REF}.log_prob_micro_batch_size_per_gpu",
    f"{REF}.log_prob_micro_batch_size",
)
"""These keys are null by default, so any other value is the user's."""


def check_steps(config: DictConfig) -> None:
    """Check how a step's samples are put together and cut into mini-batches, whatever computes them.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    check_groups(config)
    _check_fetches(config)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    prompts, mini_batch = config.data.train_batch_size, actor.ppo_mini_batch_size
    if prompts % mini_batch:
        why = f"verl would fill the step's {prompts} prompts up with empty samples; use a divisor of "
        raise refuse(f"{ACTOR}.ppo_mini_batch_size", mini_batch, f"{why}data.train_batch_size={prompts}.")
    if actor.use_dynamic_bsz != rollout.log_prob_use_dynamic_bsz:
        key, value = f"{ROLLOUT}.log_prob_use_dynamic_bsz", rollout.log_prob_use_dynamic_bsz
        raise refuse(key, value, f"verl wants the same as {ACTOR}.use_dynamic_bsz={actor.use_dynamic_bsz}; drop it.")
    if actor.use_dynamic_bsz:
        _check_sizes(config)


def check_batches(config: DictConfig) -> None:
    """Check the same, and that engines, GPUs and micro-batches can share a step's samples.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    check_steps(config)
    _check_engines(config)
    if config.get("model_engine", "dp") == "dp":  # other engines share out a batch in ways of their own
        _check_ranks(config)


def check_groups(config: DictConfig) -> None:
    """Refuse groups in which nothing can be compared.

    Raises:
        SystemExit: one sample a prompt, or samples that are all the same.
    """
    estimator, rollout = config.algorithm.adv_estimator, config.actor_rollout_ref.rollout
    if estimator not in GROUP_ESTIMATORS:
        return
    if rollout.n < 2:
        why = f"algorithm.adv_estimator={estimator} compares the samples of a prompt, and alone a sample's advantage is"
        raise refuse(f"{ROLLOUT}.n", rollout.n, f"{why} its raw reward or 0; use 2 or more, e.g. 8.")
    pass_k = OmegaConf.select(config, "algorithm.soup.pass_k", default=None)
    if estimator == "pass_at_k" and pass_k is None:
        raise refuse("algorithm.adv_estimator", estimator, "only algorithm=soup and algorithm=grpo know it.")
    if estimator == "pass_at_k" and not 1 <= pass_k <= rollout.n:
        raise refuse("algorithm.soup.pass_k", pass_k, f"choose 1 to {ROLLOUT}.n={rollout.n} samples of a prompt.")
    if rollout.full_determinism:
        why = "verl then gives every request of an engine the same seed, so the samples of a prompt are all equal"
        raise refuse(f"{ROLLOUT}.full_determinism", True, f"{why}; set it to False.")


def _check_fetches(config: DictConfig) -> None:
    """Check that a step's prompts are whole fetches from the dataset; verl finds out in its first step."""
    key, fetch, prompts = "data.gen_batch_size", config.data.get("gen_batch_size"), config.data.train_batch_size
    filters = OmegaConf.select(config, "algorithm.filter_groups", default={})
    if filters.get("enable") and not filters.get("metric"):
        key, why = (
            "algorithm.filter_groups.metric",
            "groups are filtered by a metric; use reward, or another of verl's.",
        )
        raise refuse(key, filters.get("metric"), why)
    refills = OmegaConf.select(config, "trainer.v1.sampler.sync_refill_failed_groups", default=False)
    # verl itself sets it to 1 where groups may be replaced one by one.
    one_by_one = filters.get("enable") or refills or "async" in str(config.trainer.v1.trainer_mode)
    if fetch and config.trainer.use_v1 and not one_by_one and prompts % fetch:
        why = f"a step's {prompts} prompts are no whole number of such fetches"
        raise refuse(key, fetch, f"{why}; leave it null, or use a divisor of data.train_batch_size={prompts}.")


def _check_engines(config: DictConfig) -> None:
    """Check what vLLM and verl's rollout replicas assert when they start."""
    rollout, place, per_node = config.actor_rollout_ref.rollout, "trainer", config.trainer.n_gpus_per_node
    nodes = config.trainer.nnodes
    if is_separate(config):
        place, nodes, per_node = ROLLOUT, rollout.nnodes, rollout.n_gpus_per_node
    gpus = per_node * nodes
    key, tensor_parallel = f"{ROLLOUT}.tensor_model_parallel_size", rollout.tensor_model_parallel_size
    size = tensor_parallel * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    if gpus % size or size % min(per_node, size):
        why = f"an engine of {size} GPUs cannot be laid out over {nodes} x {per_node} GPUs"
        raise refuse(key, tensor_parallel, f"{why} ({place}.nnodes x {place}.n_gpus_per_node); use 1 or a divisor.")
    limits = (rollout.max_num_batched_tokens, rollout.max_num_seqs)
    if None not in limits and limits[0] < limits[1]:
        key, value = f"{ROLLOUT}.max_num_seqs", rollout.max_num_seqs
        why = f"vLLM wants a token for each in its {ROLLOUT}.max_num_batched_tokens={rollout.max_num_batched_tokens}"
        raise refuse(key, value, f"{why}; use at most that many.")
    longest = rollout.prompt_length + rollout.response_length
    if rollout.max_model_len is not None and rollout.max_model_len < longest:
        why = (
            f"responses would be cut short; data.max_prompt_length + data.max_response_length are {longest} tokens, so"
        )
        raise refuse(f"{ROLLOUT}.max_model_len", rollout.max_model_len, f"{why} use {longest} or more.")


def _check_sizes(config: DictConfig) -> None:
    """Refuse sizes of micro-batches, which verl ignores without a word when batches are dynamic."""
    tokens = f"{ACTOR}.ppo_max_token_len_per_gpu"
    for key in MICRO_BATCHES:
        value = OmegaConf.select(config, key)
        if value is not None:
            why = f"would be ignored, since micro-batches are filled up to {tokens}={OmegaConf.select(config, tokens)}"
            raise refuse(key, value, f"{why}; lower that instead, or set {ACTOR}.use_dynamic_bsz=false.")


def _check_ranks(config: DictConfig) -> None:
    """Check that FSDP's data-parallel ranks can share a mini-batch, and split their part of it."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    gpus = config.trainer.n_gpus_per_node * config.trainer.nnodes
    sequence_parallel = max(actor.ulysses_sequence_parallel_size, actor.fsdp_config.ulysses_sequence_parallel_size)
    if gpus % sequence_parallel:
        key = f"{ACTOR}.ulysses_sequence_parallel_size"
        raise refuse(key, sequence_parallel, f"does not divide the {gpus} GPUs; use a divisor.")
    split, model = actor.fsdp_config.ulysses_sequence_parallel_size, config.actor_rollout_ref.model
    if split > 1 and not model.use_remove_padding:  # the older key, which is the actor's own, verl itself refuses
        why = "only packed sequences can be split (model.use_remove_padding), which takes flash-attn"
        raise refuse(f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size", split, f"{why}; install it, or use 1.")
    ranks, samples = gpus // sequence_parallel, actor.ppo_mini_batch_size * rollout.n
    if samples % ranks:
        why = f"its {samples} samples (x rollout.n={rollout.n}) cannot be shared out over {ranks} data-parallel ranks"
        key = f"{ACTOR}.ppo_mini_batch_size"
        raise refuse(key, actor.ppo_mini_batch_size, f"{why}; make their number a multiple of that.")
    if actor.use_dynamic_bsz:
        _check_room(config, sequence_parallel)
        return
    # All that is looked at before an update; apart from its rollout, a trainer takes one mini-batch at a time.
    in_step = samples if is_separate(config) else config.data.train_batch_size * rollout.n
    fixed = [(MICRO_BATCHES[0], samples), (MICRO_BATCHES[2], in_step)]
    if (actor.use_kl_loss or config.algorithm.use_kl_in_reward) and not config.actor_rollout_ref.ref.get(
        "log_prob_use_dynamic_bsz"
    ):
        fixed.append((MICRO_BATCHES[4], in_step))
    for key, in_all in fixed:
        micro_batch, share = OmegaConf.select(config, key), in_all // ranks
        if micro_batch is None:  # verl's driver takes the older key as well, its workers do not
            raise refuse(key, None, f"a rank has {share} samples; use a divisor, or {ACTOR}.use_dynamic_bsz=true.")
        if share % micro_batch:
            why = f"does not divide the {share} samples of a rank; use a divisor, or {ACTOR}.use_dynamic_bsz=true."
            raise refuse(key, micro_batch, why)


def _check_room(config: DictConfig, sequence_parallel: int) -> None:
    """Check that a dynamic micro-batch has room for the longest sequence."""
    rollout = config.actor_rollout_ref.rollout
    longest = max(rollout.prompt_length + rollout.response_length, PADDING_ROW)
    for key in (
        f"{ACTOR}.ppo_max_token_len_per_gpu",
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
        f"{REF}.log_prob_max_token_len_per_gpu",
    ):
        tokens = OmegaConf.select(config, key)
        if tokens is None or tokens * sequence_parallel < longest:
            why = f"a sequence may have {longest} tokens (prompt and response; verl's padding: {PADDING_ROW})"
            raise refuse(key, tokens, f"{why}, and none is split; use that many or more.")
