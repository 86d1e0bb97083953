"""What the lab cannot do, and refuses by name."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.soup.checks.losses import GROUP_ONLY
from recipe.soup.errors import refuse
from recipe.soup.names import AGENT_NAME

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
ONLY_REAL: dict[str, tuple[Any, ...]] = {
    "algorithm.use_kl_in_reward": (False,),
    "algorithm.rollout_correction.rollout_rs": (None,),
    "actor_rollout_ref.actor.use_kl_loss": (False,),
    "actor_rollout_ref.actor.shuffle": (False,),
    "actor_rollout_ref.actor.optim.lr_scheduler_type": ("constant",),
    "actor_rollout_ref.actor.optim.lr_warmup_steps": (-1, 0, None),
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": (0.0,),
    "actor_rollout_ref.model.lora_rank": (0,),
    "actor_rollout_ref.model.lora_adapter_path": (None,),
    "algorithm.soup.snapshot.placement": ("colocated", "standalone"),
    f"{ROLLOUT}.top_p": (1.0,),
    f"{ROLLOUT}.top_k": (-1, 0),
    f"{ROLLOUT}.min_p": (0.0, None),
    f"{ROLLOUT}.repetition_penalty": (1.0, None),
    f"{ROLLOUT}.val_kwargs.top_p": (1.0,),
    f"{ROLLOUT}.val_kwargs.top_k": (-1, 0),
    f"{ROLLOUT}.val_kwargs.do_sample": (True,),
    f"{ROLLOUT}.ignore_eos": (False,),
    "data.shuffle": (True,),
    "data.tool_config_path": (None,),
    "data.function_tool_path": (None,),
    "algorithm.soup.sigterm_grace": (0.0,),
    "trainer.critic_warmup": (0,),
    "trainer.v1.trainer_mode": ("soup",),
    "trainer.v1.sampler.custom_sampler.path": (None,),
    "trainer.v1.sampler.sync_refill_failed_groups": (False,),
    f"{ROLLOUT}.agent.default_agent_loop": (AGENT_NAME,),
}
"""What the lab would ignore: key, and the values at which that makes no difference."""


def check_lab_config(config: DictConfig) -> None:
    """Refuse what only the real path can do.

    Raises:
        SystemExit: which key, which value, what to do.
    """
    for key, allowed in ONLY_REAL.items():
        value = OmegaConf.select(config, key, default=allowed[0])
        if value not in allowed:
            raise refuse(key, value, f"only the real path can do that; set it to {allowed[0]}, or use main_ppo.")
    actor = config.actor_rollout_ref.actor
    limit = "ppo_max_token_len_per_gpu" if actor.use_dynamic_bsz else "ppo_micro_batch_size_per_gpu"
    if actor.get(limit) is None:
        why = f"with use_dynamic_bsz={actor.use_dynamic_bsz} it says how large a micro-batch may be; give a number."
        raise refuse(f"{ACTOR}.{limit}", None, why)
    estimator = config.algorithm.adv_estimator
    if estimator in GROUP_ONLY and estimator != "pass_at_k":
        raise refuse(
            "algorithm.adv_estimator", estimator, "only the real path can do that; use soup, grpo, rloo or pass_at_k."
        )
