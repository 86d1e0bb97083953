"""The settings of one run: `algorithm.soup`, with what is left to `auto` decided by the rest of the config."""

from typing import Literal

from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import refuse
from recipe.soup.names import TRAINER_MODE
from recipe.soup.settings import SoupSettings, parse_settings

FLOAT32 = ("float32", "fp32", "float", "32")
FLOAT16 = ("float16", "fp16", "16")
MIXED_PRECISION = "actor_rollout_ref.actor.fsdp_config.mixed_precision"


def run_settings(config: DictConfig) -> SoupSettings:
    """Read and check `algorithm.soup` of a run's composed config, and decide what is `auto`.

    Raises:
        SystemExit: see `parse_settings`.
    """
    settings = parse_settings(config.algorithm.get("soup"), config.actor_rollout_ref.rollout.response_length)
    if settings.behavior_log_probs == "auto":
        settings.behavior_log_probs, _ = whose_log_probs(config, settings)
    return settings


def what_auto_means(config: DictConfig) -> str | None:
    """One line for the start of a run that mixes and leaves something to `auto`, else None."""
    settings = parse_settings(config.algorithm.get("soup"), config.actor_rollout_ref.rollout.response_length)
    if settings.behavior_log_probs != "auto" or not settings.mixes:
        return None
    who, why = whose_log_probs(config, settings)
    return f"algorithm.soup.behavior_log_probs=auto: {who}, since {why}."


def whose_log_probs(config: DictConfig, settings: SoupSettings) -> tuple[Literal["rollout", "trainer"], str]:
    """Who computes the behaviour log-probs of prefixes where that is `auto`, and why; our choice.

    The continuation's ratio is the trainer's log-probs against the trainer's. With the engine's on the prefix, that
    ratio alone would also carry what engine and trainer round differently: clipping, KL and effective sample size would
    then measure rounding beside age.
    """
    for applies, why in (
        (not settings.mixes, "nothing is mixed"),
        (_needs_none(settings), f"ratio={settings.ratio} does without them"),
        (settings.source == "snapshot", "with source=snapshot the trainer no longer holds the weights that sample"),
        (config.trainer.v1.trainer_mode != TRAINER_MODE, "weights change while this trainer's responses are sampled"),
        (_bypasses(config), "with bypass_mode the trainer computes none"),
        (in_float32(config), "engine and trainer both compute in float32, and agree"),
    ):
        if applies:
            return "rollout", why
    return "trainer", "engine and trainer round differently (costs one forward pass over prompts and prefixes)"


def in_float32(config: DictConfig) -> bool:
    """Whether rollout engine and trainer both compute in float32."""
    # Without `mixed_precision` verl's FSDP engines compute in bfloat16, whatever the weights' own type.
    return _param_dtype(config) in FLOAT32 and str(config.actor_rollout_ref.rollout.dtype) in FLOAT32


def in_float16(config: DictConfig) -> bool:
    """Whether the trainer computes in float16, for which verl's FSDP engines scale the gradient."""
    return _param_dtype(config) in FLOAT16


def _param_dtype(config: DictConfig) -> str:
    given = OmegaConf.select(config, MIXED_PRECISION, default=None)
    if given is not None and not OmegaConf.is_dict(given):
        raise refuse(MIXED_PRECISION, given, "is a group of keys, param_dtype and its like; give one, or null.")
    return str(given.get("param_dtype")) if given is not None else ""


def _needs_none(settings: SoupSettings) -> bool:
    return settings.ratio in ("detached", "luffy", "nll") and settings.second_moment is None


def _bypasses(config: DictConfig) -> bool:
    return bool(OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode", default=False))
