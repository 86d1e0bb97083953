"""Configs of every kind, to be drawn: keys of ours off the settings' model, and keys of verl beside them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic.fields import FieldInfo

from recipe.soup.checks.batches import MICRO_BATCHES
from recipe.soup.checks.config import RULES
from recipe.soup.checks.losses import ESTIMATORS, POLICY_LOSSES
from recipe.soup.checks.sizes import COUNTS, STEPS
from recipe.soup.lab.refusals import ONLY_REAL
from recipe.soup.settings import POLICIES, SoupSettings

Overrides = dict[str, Any]
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
CORRECTION = "algorithm.rollout_correction"
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    0.5,
    2.0,
    10**9,
    math.nan,
    math.inf,
    "",
    "many",
    "1e3",
    [],
    [1],
    {},
    {"a": 1},
)
"""What somebody may write by mistake, for any key."""
NUMBERS = (0, 1, 2, 3, 4, 8, 16, 24, 0.1, 0.25, 0.5, 0.9)
MISSING = "/no/such/place"


def of_field(name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values that a key of ours may have by its type, choices and bounds."""
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind is not None]
    choices = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    if choices:
        return st.sampled_from(choices)
    if name == "snapshot.policy":
        return st.sampled_from([*POLICIES, MISSING, "owner/model"])
    low = min([bound.ge for bound in field.metadata if isinstance(bound, Ge)] or [0])  # pyright: ignore[reportArgumentType]
    above = [bound.gt for bound in field.metadata if isinstance(bound, Gt)]
    high = [bound.le for bound in field.metadata if isinstance(bound, Le)]
    within = [n for n in NUMBERS if n >= low and all(n > b for b in above) and all(n <= b for b in high)]  # pyright: ignore[reportOperatorIssue]
    whole = any("int" in str(kind) for kind in kinds)
    values: list[Any] = [n for n in within if not whole or isinstance(n, int)]
    return st.sampled_from([*values, None] if type(None) in kinds else values)


OURS = {f"{SoupSettings.path}.{name}": of_field(name, field) for name, field in SoupSettings.every_key()}

CHOSEN: dict[str, tuple[Any, ...]] = {
    "algorithm.adv_estimator": (*ESTIMATORS, "gae", "remax", "gdpo"),
    "algorithm.filter_groups.enable": (True, False),
    "algorithm.filter_groups.metric": ("acc", "seq_reward", None),
    "algorithm.norm_adv_by_std_in_grpo": (True, False),
    f"{CORRECTION}.bypass_mode": (True, False),
    f"{CORRECTION}.rollout_is": ("token", "sequence", None),
    f"{CORRECTION}.rollout_is_threshold": (2.0, "0.5_2", None),
    f"{CORRECTION}.rollout_rs": ("token_k1", "token_k1,seq_mean_k3", None),
    f"{CORRECTION}.rollout_rs_threshold": (2.0, "0.5_2,3", None),
    f"{ACTOR}.policy_loss.loss_mode": (*POLICY_LOSSES, "geo_mean", "cispo"),
    f"{ACTOR}.strategy": ("fsdp", "fsdp2", "megatron"),
    f"{ACTOR}.use_kl_loss": (True, False),
    f"{ACTOR}.use_dynamic_bsz": (True, False),
    f"{ACTOR}.optim.lr": (1e-6, 0, 1e-3),
    f"{ACTOR}.entropy_coeff": (0, 0.01),
    f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": (1, 2),
    f"{ACTOR}.fsdp_config.mixed_precision": ({"param_dtype": "bf16"}, {"param_dtype": "fp16"}, None),
    f"{MODEL}.path": (MISSING, "owner/model", "a/b/c", "s3://bucket/model"),
    f"{MODEL}.tokenizer_path": (MISSING, None),
    f"{MODEL}.lora_rank": (0, 8),
    f"{MODEL}.lora.merge": (True, False),
    f"{ROLLOUT}.agent.agent_loop_config_path": (MISSING, None),
    f"{ROLLOUT}.agent.default_agent_loop": ("soup_agent", "soup_tool_agent", "tool_agent", "single_turn_agent"),
    f"{ROLLOUT}.multi_turn.enable": (True, False),
    f"{ROLLOUT}.multi_turn.format": ("hermes", "nobody's"),
    f"{ROLLOUT}.multi_turn.function_tool_path": (MISSING, "tools.py", None),
    f"{ROLLOUT}.multi_turn.tool_config_path": (MISSING, None),
    f"{ROLLOUT}.dtype": ("float32", "bfloat16"),
    f"{ROLLOUT}.temperature": (1.0, 0.7, 1, 0, "1.0"),
    f"{ROLLOUT}.gpu_memory_utilization": (0.5, 0.9, 1),
    f"{ROLLOUT}.free_cache_engine": (True, False),
    f"{ROLLOUT}.full_determinism": (True, False),
    f"{ROLLOUT}.seed": (0, 1, 42, None),
    f"{ROLLOUT}.val_kwargs.n": (1, 4),
    f"{ROLLOUT}.val_kwargs.temperature": (0, 1.0),
    f"{ROLLOUT}.val_kwargs.do_sample": (True, False),
    "data.train_files": (MISSING, [MISSING], "hdfs://a/b.parquet"),
    "data.val_files": (MISSING, [MISSING], None),
    "data.train_max_samples": (-1, 16, 64, 8),
    "data.gen_batch_size": (None, 1, 8, 16),
    "data.seed": (None, 0, 1),
    "data.shuffle": (True, False),
    "data.prompt_key": ("prompt", "question"),
    "reward.custom_reward_function.path": (MISSING, "pkg://nowhere.at_all", None),
    "reward.custom_reward_function.name": ("compute_score", "other"),
    "trainer.device": ("cpu", "cuda"),
    "trainer.logger": ("console", ["console", "file"], ["wandb"], ["csv"]),
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
    "trainer.resume_from_path": (f"{MISSING}/global_step_4", "global_step_x", None),
    "trainer.default_local_dir": ("checkpoints", "/proc/x"),
    "trainer.save_freq": (-1, 1, 5),
    "trainer.test_freq": (-1, 1, 5),
    "trainer.val_before_train": (True, False),
    "trainer.val_only": (True, False),
    "trainer.v1.trainer_mode": (
        *("soup", "soup_colocate_async", "soup_separate_async"),
        *("sync", "colocate_async", "separate_async"),
    ),
    "actor_rollout_ref.rollout.nnodes": (0, 1, 2),
    "trainer.v1.separate_async.parameter_sync_step": (1, 2, 4, None),
    "ray_kwargs.ray_init.num_cpus": (5, 8, 64, None),
}
"""Values that go with one another in some ways and not in others."""
SMALL = st.sampled_from([1, 2, 3, 4, 8, 16, 24, 32, 64, 1024, None])
VERL = {
    **dict.fromkeys((*COUNTS, *STEPS, *MICRO_BATCHES), SMALL),
    **{key: st.sampled_from(allowed) for key, allowed, _ in RULES},
    **{key: st.sampled_from(allowed) for key, allowed in ONLY_REAL.items()},
    **{key: st.sampled_from(values) for key, values in CHOSEN.items()},
}
"""Every key of verl that a check looks at by its name in a table, and what else interacts."""


@st.composite
def overrides(draw: st.DrawFn) -> Overrides:
    """A few keys with values of their own kind, and now and then one that makes no sense."""
    ours = draw(st.lists(st.sampled_from(sorted(OURS)), unique=True, max_size=6))
    theirs = draw(st.lists(st.sampled_from(sorted(VERL)), unique=True, max_size=3))
    given = {key: draw(OURS[key]) for key in ours} | {key: draw(VERL[key]) for key in theirs}
    if draw(st.integers(0, 2)) == 0:
        given[draw(st.sampled_from(sorted(OURS | VERL)))] = draw(st.sampled_from(ODD))
    return given


@contextmanager
def changed(config: DictConfig, given: Overrides) -> Iterator[DictConfig]:
    """The config with these keys changed, as long as this lasts; a copy of the whole takes a tenth of a second."""
    before: list[tuple[Any, str, Any]] = []
    for key, value in given.items():
        *way, name = key.split(".")
        parent: Any = config
        for part in way:
            child = parent.get(part)
            if not OmegaConf.is_dict(child):
                before.append((parent, part, parent._content.pop(part, None)))
                with open_dict(parent):
                    parent[part] = {}
            parent = parent[part]
        before.append((parent, name, parent._content.pop(name, None)))
        with open_dict(parent):
            parent[name] = value
    try:
        yield config
    finally:
        for parent, name, node in reversed(before):
            if node is None:
                parent._content.pop(name, None)
            else:
                parent._content[name] = node
