"""Refuse every config that SOUP cannot honour, at start, by key and value.

Each check raises a SystemExit with one sentence: Hydra would swallow any other exception from its callback.
"""

from omegaconf import DictConfig

from recipe.soup.checks.demonstrations import check_demonstrations
from recipe.soup.checks.loops import check_loops, check_tools
from recipe.soup.checks.losses import check_loss, check_partial_rollouts
from recipe.soup.checks.model import check_place
from recipe.soup.checks.resume import check_prefixes, check_under_way
from recipe.soup.checks.rows import MULTI_MEDIA, check_named, local_files, own_dataset
from recipe.soup.checks.rules import Rule, check_rules
from recipe.soup.checks.separate_async import check_separate_source
from recipe.soup.checks.snapshots import check_snapshots
from recipe.soup.checks.tables import read_table
from recipe.soup.checks.verification import check_verification
from recipe.soup.errors import refuse
from recipe.soup.names import ASYNC_TRAINER_MODES, SEPARATE_TRAINER_MODE, TRAINER_MODES
from recipe.soup.run_settings import run_settings

ROLLOUT = "actor_rollout_ref.rollout"


def check_config(config: DictConfig) -> None:
    """Check the composed config of a run with `algorithm=soup`.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    settings = run_settings(config)
    check_rules(config, RULES)
    temperature = config.actor_rollout_ref.rollout.temperature
    if temperature <= 0:
        raise refuse(f"{ROLLOUT}.temperature", temperature, "greedy tokens have no sampling probability; use 1.0.")
    per_prefix, n = settings.samples_per_prefix, config.actor_rollout_ref.rollout.n
    if n % per_prefix:
        why = f"rollout.n={n} samples cannot be shared out evenly; use a divisor of it."
        raise refuse("algorithm.soup.samples_per_prefix", per_prefix, why)
    check_loops(config)
    if settings.mixes:
        check_tools(config, settings)
        check_loss(config, settings)
        if config.trainer.v1.trainer_mode in ASYNC_TRAINER_MODES:
            check_partial_rollouts(settings)
        if config.trainer.v1.trainer_mode == SEPARATE_TRAINER_MODE:
            check_separate_source(settings)
    check_place(config)
    _check_data(config)
    if settings.demonstrates:
        check_demonstrations(config, settings)
    if settings.verifies:
        check_verification(config)
    if settings.mixes and settings.source == "snapshot":
        check_snapshots(config, settings.snapshot)
    check_under_way(config, settings)
    if settings.mixes:
        check_prefixes(config, settings)


_BIASED = "log-probs are recorded for the full distribution at the rollout's temperature, so this biases every ratio"
_FROM_DISK = "samples of another run were not sampled by the policies of this one"
_TEMPERATURE = "ratios need log-probs at the rollout's temperature"
RULES: tuple[Rule, ...] = (
    ("trainer.use_v1", (True,), "SOUP extends verl's v1 trainer"),
    ("trainer.v1.trainer_mode", TRAINER_MODES, "SOUP has trainers of its own"),
    (f"{ROLLOUT}.name", ("vllm",), "only vLLM is supported yet"),
    (f"{ROLLOUT}.top_p", (1.0,), _BIASED),
    (f"{ROLLOUT}.top_k", (-1, 0), _BIASED),
    (f"{ROLLOUT}.min_p", (0.0, None), _BIASED),
    (f"{ROLLOUT}.repetition_penalty", (1.0, None), _BIASED),
    (f"{ROLLOUT}.logprobs_mode", ("processed_logprobs",), _TEMPERATURE),
    (f"{ROLLOUT}.engine_kwargs.vllm.logprobs_mode", ("processed_logprobs",), _TEMPERATURE),
    (f"{ROLLOUT}.calculate_log_probs", (True,), "ratios need the log-probs of the policy that sampled each token"),
    (f"{ROLLOUT}.enable_rollout_routing_replay", (False,), "a complete prefix has no routing to replay"),
    (f"{ROLLOUT}.disaggregation.enabled", (False,), "prefixes have not been tried with prefill and decode apart"),
    ("model_engine", ("dp",), "SOUP's loss has been tried with FSDP only"),
    ("skip.rollout.enable", (False,), _FROM_DISK),
    ("skip.rollout_tq.enable", (False,), _FROM_DISK),
    ("skip.async_rollout.enable", (False,), _FROM_DISK),
    ("trainer.v1.sync.parameter_sync_step", (1,), "a version is one update"),
    ("trainer.v1.colocate_async.parameter_sync_step", (1,), "a version is one update"),
    ("distillation.enabled", (False,), "its loss and SOUP's are not combined yet"),
    ("algorithm.use_kl_in_reward", (False,), "the penalty would be taken at the historical policy; use a KL loss"),
)


_COLUMNS = {
    "__do_sample__": "would make samples greedy, which have no sampling probability",
    "__rollout_n__": "would change the number of samples that prefixes are planned for",
}


def _check_data(config: DictConfig) -> None:
    """Check that no column of the data bypasses what SOUP does."""
    if own_dataset(config):
        return
    for name in ("train_files", "val_files"):
        check_named(config, name)
        for key, path in local_files(config, name):
            columns = read_table(key, path).columns
            for column, effect in _COLUMNS.items():
                if column in columns:
                    raise refuse(key, path, f"its column `{column}` {effect}; remove it from the dataset.")
            for media in MULTI_MEDIA:
                column = config.data.get(media)
                if column in columns:
                    why = f"{path} has this column; multimodal data is not supported yet."
                    raise refuse(f"data.{media}", column, why)
