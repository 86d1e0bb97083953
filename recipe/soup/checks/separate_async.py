"""Refuse what a trainer apart from its rollout cannot honour, at start, under `algorithm=soup`, `grpo` and `verl`.

verl asserts most of it when its trainer is made, minutes later; adapters it would leave out for ever, without a word.
"""

from importlib.util import find_spec

from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import refuse
from recipe.soup.settings import SoupSettings
from verl_ext.placement import is_separate
from verl_ext.plugin.callbacks import SUPPORTED_VERL

ROLLOUT = "actor_rollout_ref.rollout"
STEPS = "trainer.v1.separate_async.parameter_sync_step"
BACKEND = f"{ROLLOUT}.checkpoint_engine.backend"


def check_separate_async(config: DictConfig) -> None:
    """Check what verl's trainer apart from its rollout needs, ours or verl's own.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    if not is_separate(config):
        return
    prompts, mini_batch = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    updates = OmegaConf.select(config, STEPS)
    if not isinstance(updates, int) or updates < 1 or prompts != updates * mini_batch:
        why = f"data.train_batch_size={prompts} must be this many mini-batches of ppo_mini_batch_size={mini_batch}"
        raise refuse(STEPS, updates, f"{why}, one for each update; set it to {max(prompts // mini_batch, 1)}.")
    rollout = config.actor_rollout_ref.rollout
    for name in ("nnodes", "n_gpus_per_node"):
        if not isinstance(rollout[name], int) or rollout[name] < 1:
            raise refuse(f"{ROLLOUT}.{name}", rollout[name], "the rollout has GPUs of its own here; give it 1 or more.")
    if rollout.checkpoint_engine.backend == "naive":
        why = "only carries weights within a process; use nccl, or ray_store (hardware=cpu has it) without accelerators"
        raise refuse(BACKEND, "naive", f"{why}.")
    if rollout.checkpoint_engine.backend == "nccl" and config.trainer.device == "cuda" and find_spec("cupy") is None:
        why = "verl's engine of this name needs cupy, which is not installed here"
        raise refuse(BACKEND, "nccl", f"{why}; run `pip install 'verl[cupy-cu130]=={SUPPORTED_VERL}'`.")
    model = config.actor_rollout_ref.model
    lora = model.get("lora") or {}
    if not lora.get("merge", False):
        why = "this trainer sends whole weights, and adapters that are not merged would never reach the rollout"
        for key, value in (
            ("lora_rank", model.get("lora_rank", 0)),
            ("lora.rank", lora.get("rank", 0)),
            ("lora_adapter_path", model.get("lora_adapter_path")),
        ):
            if value:
                raise refuse(f"actor_rollout_ref.model.{key}", value, f"{why}; set model.lora.merge to True.")
    reward = config.reward.reward_model
    if reward.enable and not reward.enable_resource_pool:
        key = "reward.reward_model.enable_resource_pool"
        raise refuse(key, False, "the rollout never rests, so a reward model needs GPUs of its own; set it to True.")


def check_separate_source(settings: SoupSettings) -> None:
    """Refuse the source that takes the way by which weights reach the rollout.

    Raises:
        SystemExit: `source=snapshot`.
    """
    if settings.source == "snapshot":
        why = f"takes {BACKEND}, by which weights reach the rollout of trainer.v1.trainer_mode=soup_separate_async"
        raise refuse("algorithm.soup.source", "snapshot", f"{why}; use lookahead or replay.")
