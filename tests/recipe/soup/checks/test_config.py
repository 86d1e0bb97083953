"""Everything that can't be honoured is refused in one sentence: key, value, fix. And nothing else is."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from refusals import changing, sentence
from safetensors.torch import save_file

from recipe.soup.bank_origin import NOTHING, SOURCE
from recipe.soup.checks.callbacks import RefuseWrongConfig, RefuseWrongSettings
from recipe.soup.checks.config import check_config
from recipe.soup.names import ASYNC_TRAINER_MODES
from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.prefixes.source import BANK_FILE
from recipe.soup.settings import parse_settings

Compose = Callable[..., DictConfig]
BASE = ("algorithm=soup", "hardware=cpu", "example=countdown")
ROLLOUT = "actor_rollout_ref.rollout"
ASYNC = "trainer.v1.trainer_mode=soup_colocate_async"
SEPARATE = "trainer.v1.trainer_mode=soup_separate_async"


@pytest.fixture(scope="module")
def example(composed: Compose) -> Callable[..., DictConfig]:
    return changing(composed(*BASE))


def test_the_example_is_accepted(composed: Compose) -> None:
    check_config(composed(*BASE))


def test_soup_without_example_and_hardware_is_accepted(composed: Compose, countdown_dir: Path) -> None:
    data = [f"data.{kind}_files={countdown_dir}/data/{kind}.parquet" for kind in ("train", "val")]
    model = f"actor_rollout_ref.model.path={countdown_dir}/base_model"
    check_config(composed("algorithm=soup", f"{ROLLOUT}.name=vllm", model, *data))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.soup.mixed_share=1.5", ["algorithm.soup.mixed_share=1.5", "between 0 and 1"]),
        ("algorithm.soup.mixed_share=-0.1", ["algorithm.soup.mixed_share=-0.1"]),
        ("algorithm.soup.lag=-1", ["algorithm.soup.lag=-1", "0 or more"]),
        ("algorithm.soup.lag=many", ["algorithm.soup.lag=many"]),
        ("algorithm.soup.prefix_length.max=24", ["algorithm.soup.prefix_length.max=24", "23"]),
        ("algorithm.soup.prefix_length.min=0", ["algorithm.soup.prefix_length.min=0"]),
        ("algorithm.soup.prefix_length.min=9", ["algorithm.soup.prefix_length.min=9", "8"]),
        ("algorithm.soup.prefix_length.distribution=normal", ["prefix_length.distribution=normal", "uniform"]),
        ("algorithm.soup.warm_start=cold", ["algorithm.soup.warm_start=cold", "pure, fill, ramp"]),
        ("algorithm.soup.on_eos=drop", ["algorithm.soup.on_eos=drop", "keep, cut"]),
        ("algorithm.soup.source=memory", ["algorithm.soup.source=memory", "lookahead, snapshot, replay"]),
        ("algorithm.soup.snapshot.every=0", ["algorithm.soup.snapshot.every=0"]),
        ("algorithm.soup.snapshot.keep=1", ["algorithm.soup.snapshot.keep=1", "lag=8", "every=4", "3"]),
        ("algorithm.soup.snapshot.eviction=lru", ["snapshot.eviction=lru", "log_spaced"]),
        ("algorithm.soup.snapshot.storage=tape", ["snapshot.storage=tape", "memory, disk"]),
        ("algorithm.soup.snapshot.placement=cloud", ["snapshot.placement=cloud", "standalone"]),
        ("algorithm.soup.ratio=none", ["algorithm.soup.ratio=none", "behavior"]),
        ("algorithm.soup.dump_rows=0", ["algorithm.soup.dump_rows=0", "1 or more", "null"]),
        ("algorithm.soup.max_lost_share=-0.1", ["algorithm.soup.max_lost_share=-0.1", "between 0"]),
        ("algorithm.soup.max_wait=0", ["algorithm.soup.max_wait=0", "give seconds"]),
        ("algorithm.soup.sigterm_grace=-1", ["algorithm.soup.sigterm_grace=-1", "give seconds"]),
        ("algorithm.soup.broken_steps=ignore", ["algorithm.soup.broken_steps=ignore", "stop, warn"]),
        ("algorithm.soup.max_lost_share=5", ["algorithm.soup.max_lost_share=5", "and 1"]),
        ("+algorithm.soup.lagg=3", ["algorithm.soup.lagg=3"]),
        ("+trainer.v1.sync.parameter_sync_step=2", ["trainer.v1.sync.parameter_sync_step=2", "set it to 1"]),
        ("+trainer.v1.colocate_async.parameter_sync_step=2", ["parameter_sync_step=2", "a version is one update"]),
        ("+algorithm.soup.prefix_length.mean=3", ["algorithm.soup.prefix_length.mean=3"]),
        (f"{ROLLOUT}.top_p=0.9", [f"{ROLLOUT}.top_p=0.9", "1.0"]),
        (f"{ROLLOUT}.top_k=50", [f"{ROLLOUT}.top_k=50", "-1"]),
        (f"+{ROLLOUT}.min_p=0.1", [f"{ROLLOUT}.min_p=0.1"]),
        (f"+{ROLLOUT}.repetition_penalty=1.1", [f"{ROLLOUT}.repetition_penalty=1.1"]),
        (f"{ROLLOUT}.temperature=0", [f"{ROLLOUT}.temperature=0"]),
        (f"{ROLLOUT}.logprobs_mode=raw_logprobs", [f"{ROLLOUT}.logprobs_mode=raw_logprobs", "processed_logprobs"]),
        (f"{ROLLOUT}.calculate_log_probs=false", [f"{ROLLOUT}.calculate_log_probs=False", "True"]),
        ("trainer.v1.trainer_mode=colocate_async", ["trainer.v1.trainer_mode=colocate_async", "soup"]),
        ("trainer.use_v1=false", ["trainer.use_v1=False"]),
        (f"{ROLLOUT}.name=sglang", [f"{ROLLOUT}.name=sglang", "vllm"]),
        (f"{ROLLOUT}.agent.default_agent_loop=tool_agent", ["default_agent_loop=tool_agent", "soup_agent"]),
        ("actor_rollout_ref.model.path=/no/such/model", ["actor_rollout_ref.model.path=/no/such/model"]),
        ("data.train_files=/no/such.parquet", ["data.train_files=/no/such.parquet"]),
        ("data.val_files=[/no/such.parquet]", ["data.val_files=/no/such.parquet"]),
        (
            f"+{ROLLOUT}.engine_kwargs.vllm.logprobs_mode=raw_logprobs",
            ["engine_kwargs.vllm.logprobs_mode=raw_logprobs"],
        ),
        (f"{ROLLOUT}.disaggregation.enabled=true", ["disaggregation.enabled=True"]),
        ("model_engine=megatron", ["model_engine=megatron", "set it to dp"]),
        ("model_engine=veomni", ["model_engine=veomni", "set it to dp"]),
        ("model_engine=torchtitan", ["model_engine=torchtitan", "set it to dp"]),
        ("skip.rollout.enable=true", ["skip.rollout.enable=True", "of another run"]),
        ("skip.rollout_tq.enable=true", ["skip.rollout_tq.enable=True", "of another run"]),
        ("skip.async_rollout.enable=true", ["skip.async_rollout.enable=True", "of another run"]),
        (f"{ROLLOUT}.enable_rollout_routing_replay=true", ["enable_rollout_routing_replay=True"]),
        (f"{ROLLOUT}.response_length=8", ["algorithm.soup.prefix_length.max=8", "7"]),
        ("distillation.enabled=true", ["distillation.enabled=True"]),
        ("algorithm.use_kl_in_reward=true", ["algorithm.use_kl_in_reward=True"]),
        ("data.image_key=prompt", ["data.image_key=prompt", "multimodal"]),
    ],
)
def test_refused(composed: Compose, example: Compose, override: str, words: list[str]) -> None:
    text = sentence(check_config, composed(*BASE, override) if override.startswith("+") else example(override))
    for word in words:
        assert word in text


@pytest.mark.parametrize("override", ["algorithm.soup.dump_rows=0", "algorithm.soup.max_lost_share=5.0"])
def test_refused_of_the_twin_before_ray_starts(composed: Compose, override: str) -> None:
    config = composed("algorithm=grpo", *BASE[1:], override)
    RefuseWrongSettings().on_job_start(composed("algorithm=grpo", *BASE[1:]))
    with pytest.raises(SystemExit, match=f"^{re.escape(override)}: "):
        RefuseWrongSettings().on_job_start(config)
    with resources.files("recipe.soup.config.algorithm").joinpath("grpo.yaml").open() as file:
        assert (
            OmegaConf.load(file).hydra.callbacks.settings._target_ == "recipe.soup.checks.callbacks.RefuseWrongSettings"
        )


FULL = {
    "soup": "algorithm.soup",
    "length": "algorithm.soup.prefix_length",
    "schedules": "algorithm.soup.schedules",
    "snapshot": "algorithm.soup.snapshot",
    "correction": "algorithm.rollout_correction",
    "estimator": "algorithm.adv_estimator",
    "loss": "actor_rollout_ref.actor.policy_loss.loss_mode",
}


def spelled_out(override: str) -> str:
    """`soup.lag=1` as `algorithm.soup.lag=1`, and so on."""
    head = override.replace("=", ".").split(".")[0]
    return FULL.get(head, head) + override.removeprefix(head)


SHAPES = "choose one of constant, linear, cosine"
GROW = "schedules.mixed_share.shape=linear"
FRACTION = "length.unit=fraction length.min=null length.max=null"


@pytest.mark.parametrize(
    ("overrides", "refused", "advice"),
    [
        # Names.
        ("", "soup.lag_distribution=normal", "choose one of fixed, uniform, geometric"),
        ("", "length.distribution=normal", "choose one of uniform, fixed, beta, whole"),
        ("", "length.unit=words", "choose one of tokens, fraction"),
        ("", "soup.selection=longest", "choose one of random, failed, successful, certain, entropic"),
        ("", "schedules.mixed_share.shape=step", SHAPES),
        ("", "schedules.prefix_length.shape=step", SHAPES),
        ("", "schedules.lag.shape=step", SHAPES),
        ("", "soup.behavior_log_probs=engine", "choose one of auto, rollout, trainer"),
        ("", "soup.ratio=none", "choose one of behavior, decoupled, detached, shaped, luffy"),
        ("", "soup.loss_tokens=prefix", "choose one of all, trained"),
        ("", "soup.baseline=critic", "choose one of group, separate, two_level"),
        # The loss.
        ("", "soup.shaping_gamma=0", "above 0"),
        ("", "soup.prefix_clip.low=-0.1", "0 or more, inf for no clip"),
        ("", "soup.prefix_clip.high=-0.1", "0 or more, inf for no clip"),
        ("soup.ratio=shaped", "soup.prefix_clip.low=0.2", "ratio=shaped has no clip; drop it"),
        ("soup.ratio=luffy", "soup.prefix_clip.high=0.2", "ratio=luffy has no clip; drop it"),
        ("soup.ratio=detached", "soup.prefix_clip.high=inf", "ratio=detached has no clip; drop it"),
        ("", "soup.prefix_gradient=1.1", "between 0 (none) and 1 (all)"),
        ("", "soup.prefix_gradient=-0.1", "between 0 (none) and 1 (all)"),
        ("soup.source=replay length.distribution=whole", "soup.prefix_gradient=0", "teach nothing"),
        ("", "soup.second_moment=0", "above 0; null for none"),
        ("soup.source=snapshot", "soup.behavior_log_probs=trainer", "use auto or rollout"),
        ("", "soup.baseline=two_level", "set algorithm.soup.samples_per_prefix to 2 or more"),
        ("", "soup.continuation_weight=mean", "choose one of none, product, min, window"),
        ("", "soup.continuation_window.low=-1", "0 or more, inf for no bound"),
        ("", "soup.continuation_window.high=-1", "0 or more, inf for no bound"),
        ("soup.ratio=detached", "soup.continuation_weight=product", "use none, or behavior as algorithm.soup.ratio"),
        ("soup.ratio=luffy", "soup.continuation_weight=min", "use none, or behavior as algorithm.soup.ratio"),
        ("soup.source=replay length.distribution=whole", "soup.continuation_weight=min", "whole response; use none"),
        ("soup.ratio=decoupled correction.rollout_is=sequence", "soup.continuation_weight=min", "use none, or token"),
        ("loss=ctpo", "soup.continuation_weight=product", "use none, or soup as loss_mode"),
        ("loss=gspo", "soup.continuation_weight=min", "use none, or soup as loss_mode"),
        ("soup.ratio=shaped", "loss=m2po", "set it to soup"),
        ("loss=ctpo soup.prefix_gradient=0", "soup.loss_tokens=trained", "use all, or soup as loss_mode"),
        ("loss=gspo soup.ratio=decoupled", "soup.loss_tokens=trained", "use all, or soup as loss_mode"),
        # Schedules.
        ("", "schedules.mixed_share.end=0.1", "give it with linear or cosine only"),
        ("", "schedules.prefix_length.end=3", "give it with linear or cosine only"),
        ("", "schedules.lag.end=3", "give it with linear or cosine only"),
        (f"{GROW} schedules.mixed_share.end=1", "schedules.mixed_share.steps=1", "use more than"),
        ("", "schedules.lag.warmup=-1", "counts steps; use 0 or more"),
        ("", "schedules.prefix_length.warmup=-1", "counts steps; use 0 or more"),
        (GROW, "schedules.mixed_share.end=1.5", "between 0 and 1"),
        (GROW, "schedules.mixed_share.end=-0.5", "between 0 and 1"),
        ("schedules.lag.shape=cosine", "schedules.lag.end=-1", "use 0 or more"),
        ("schedules.prefix_length.shape=linear", "schedules.prefix_length.end=24", "use 0 to 23"),
        ("schedules.prefix_length.shape=linear", "schedules.prefix_length.end=-1", "use 0 to 23"),
        (f"{FRACTION} schedules.prefix_length.shape=linear", "schedules.prefix_length.end=1.5", "use 0 to 1,"),
        ("", "schedules.lag.steps=9", "give it with linear or cosine only"),
        ("soup.source=replay schedules.lag.end=3", "schedules.lag.shape=linear", "source=replay has no lag"),
        ("soup.source=replay", "soup.lag_distribution=uniform", "source=replay has no lag"),
        ("", "soup.stale_negatives.low=0", "above 0 and up to 1, null for no bound"),
        ("", "soup.stale_negatives.low=1.1", "above 0 and up to 1, null for no bound"),
        ("", "soup.stale_negatives.high=0.9", "1 or more, null for no bound"),
        ("soup.ratio=detached", "soup.stale_negatives.low=0.5", "use null, or behavior as algorithm.soup.ratio"),
        ("soup.ratio=luffy", "soup.stale_negatives.high=2.0", "use null, or behavior as algorithm.soup.ratio"),
        # Age.
        ("", "soup.max_age=0", "1 update old or more; null for no limit"),
        ("soup.lag=8", "soup.max_age=7", "up to 8 updates old by algorithm.soup.lag; use as many"),
        ("soup.lag=8 soup.source=snapshot", "soup.max_age=10", "up to 11 updates old"),
        ("soup.source=snapshot snapshot.policy=/x", "soup.max_age=10", "another run's policy has no age"),
        # Selection.
        ("", "soup.selection=failed", "use source=replay"),
        ("soup.source=snapshot", "soup.selection=successful", "use source=replay"),
        ("", "soup.selection=certain", "use source=replay"),
        ("", "soup.candidates=0", "sample at least 1"),
        ("", "soup.candidates=3", "otherwise use 1"),
        ("soup.selection=entropic", "soup.candidates=1", "among 2 or more"),
        ("soup.selection=entropic soup.source=replay", "soup.candidates=2", "otherwise use 1"),
        # Lengths.
        ("", "length.alpha=0", "above 0"),
        ("", "length.beta=-2", "above 0"),
        (FRACTION, "length.max=0", "above 0 and up to 1"),
        (FRACTION, "length.max=8", "above 0 and up to 1"),
        (f"{FRACTION} length.max=0.25", "length.min=0.5", "from 0 to max"),
        (f"{FRACTION} length.max=0.25", "length.min=-0.5", "from 0 to max"),
        ("", "length.max=23.5", "1 to data.max_response_length - 1 = 23"),
        ("", "length.min=0.5", "use 1 to prefix_length.max = 8"),
        # Sharing: rollout.n is 8.
        ("", "soup.samples_per_prefix=0", "one sample or more"),
        ("", "soup.samples_per_prefix=3", "use a divisor of it"),
        ("", "soup.samples_per_prefix=16", "use a divisor of it"),
        ("soup.source=replay length.distribution=whole", "soup.samples_per_prefix=2", "are equal; use 1"),
        # Snapshots, for the largest lag of the run.
        (
            "soup.source=snapshot soup.lag=1 schedules.lag.shape=linear schedules.lag.end=9",
            "snapshot.keep=2",
            "keep 3 or more",
        ),
        ("soup.source=snapshot", "snapshot.eviction=log_spaced", "use policy=pool, or eviction=oldest"),
        # verl's estimators and losses.
        ("", "estimator=gae", "a critic's advantages assume"),
        ("", "estimator=remax", "choose one of soup, grpo"),
        ("soup.source=replay", "estimator=remax", "choose one of soup, grpo"),
        ("soup.baseline=separate", "estimator=gpg", "use soup or rloo"),
        ("soup.baseline=two_level soup.samples_per_prefix=2", "estimator=grpo_passk", "use soup or rloo"),
        ("soup.baseline=separate", "estimator=opo", "use soup or rloo"),
        ("", "loss=geo_mean", "choose one of soup, vanilla"),
        ("soup.source=replay", "loss=gpg", "choose one of soup, vanilla"),
        ("soup.ratio=shaped", "loss=vanilla", "set it to soup"),
        ("soup.ratio=detached", "loss=gspo", "set it to soup"),
        ("soup.prefix_clip.low=0.5", "loss=vanilla", "set it to soup"),
        ("soup.prefix_clip.high=inf", "loss=vanilla", "set it to soup"),
        ("correction.bypass_mode=true", "soup.ratio=decoupled", "bypass_mode=true saves; set that to false"),
        ("correction.bypass_mode=true", "soup.prefix_gradient=0.5", "bypass_mode=true saves; set that to false"),
        ("correction.bypass_mode=true", "soup.second_moment=1.0", "bypass_mode=true saves; set that to false"),
        ("correction.bypass_mode=true", "soup.behavior_log_probs=trainer", "bypass_mode=true saves; set that to false"),
        ("correction.bypass_mode=true", "soup.continuation_weight=window", "bypass_mode=true saves; set that to false"),
        ("correction.bypass_mode=true", "soup.stale_negatives.low=0.5", "bypass_mode=true saves; set that to false"),
        # Partial rollouts.
        (ASYNC, "soup.stale_negatives.high=2.0", "use trainer.v1.trainer_mode=soup"),
        (ASYNC, "soup.continuation_weight=product", "use trainer.v1.trainer_mode=soup"),
        (ASYNC, "soup.ratio=shaped", "use trainer.v1.trainer_mode=soup"),
        (ASYNC, "soup.prefix_gradient=0.5", "use trainer.v1.trainer_mode=soup"),
        (ASYNC, "soup.second_moment=0.1", "use trainer.v1.trainer_mode=soup"),
        (ASYNC, "soup.baseline=separate", "use trainer.v1.trainer_mode=soup"),
        (ASYNC, "soup.behavior_log_probs=trainer", "use trainer.v1.trainer_mode=soup"),
        (SEPARATE, "soup.behavior_log_probs=trainer", "use trainer.v1.trainer_mode=soup"),
        (SEPARATE, "soup.ratio=luffy", "use trainer.v1.trainer_mode=soup"),
        (SEPARATE, "soup.source=snapshot", "use lookahead or replay"),
    ],
)
def test_outside_its_bounds(example: Compose, overrides: str, refused: str, advice: str) -> None:
    refused = spelled_out(refused)
    key, value = refused.split("=")
    config = example(*map(spelled_out, overrides.split()), refused)
    text = sentence(check_config, config)
    found = re.match(r"([\w.]+)=(\S+): ", text)
    assert found is not None, text
    assert found.group(1) == key
    # A number may be written in another way, 0 as 0.0.
    assert found.group(2) == value or float(found.group(2)) == float(value)
    assert advice in text


@pytest.mark.parametrize(
    "overrides",
    [
        "soup.lag_distribution=uniform",
        "soup.lag_distribution=geometric soup.source=snapshot",
        "length.distribution=beta length.alpha=0.1 length.beta=9 length.max=23",
        "length.unit=fraction length.min=0 length.max=1",
        FRACTION,
        "soup.selection=failed soup.source=replay",
        "soup.selection=successful soup.source=replay",
        "soup.selection=entropic soup.source=replay",
        "soup.selection=entropic soup.candidates=2",
        "soup.selection=entropic soup.candidates=5 soup.source=snapshot",
        "soup.ratio=decoupled",
        "soup.ratio=detached",
        "soup.ratio=shaped soup.shaping_gamma=0.01",
        "soup.ratio=luffy",
        "soup.prefix_clip.low=0 soup.prefix_clip.high=inf",
        "soup.prefix_gradient=0",
        "soup.prefix_gradient=1",
        "soup.second_moment=0.04",
        "soup.loss_tokens=trained",
        "soup.continuation_weight=product soup.prefix_gradient=0 soup.loss_tokens=trained loss=sapo",
        "soup.continuation_weight=min soup.ratio=decoupled correction.rollout_is=token",
        "soup.continuation_weight=window soup.continuation_window.low=inf correction.rollout_is=sequence",
        "soup.continuation_weight=product soup.source=replay soup.selection=steered soup.second_moment=0.04",
        "soup.behavior_log_probs=trainer",
        "soup.behavior_log_probs=trainer soup.source=replay",
        "soup.baseline=separate estimator=rloo",
        "soup.baseline=two_level soup.samples_per_prefix=2",
        "soup.samples_per_prefix=8",
        "soup.stale_negatives.low=0.5 soup.stale_negatives.high=2 soup.ratio=shaped",
        "soup.stale_negatives.low=1 soup.source=replay length.distribution=whole soup.prefix_clip.high=inf",
        "loss=ctpo soup.stale_negatives.low=0.5",
        "loss=ctpo soup.ratio=decoupled soup.continuation_weight=product",
        "loss=m2po soup.continuation_weight=min",
        "loss=m2po soup.prefix_gradient=0 soup.loss_tokens=trained",
        "loss=ctpo soup.prefix_gradient=0",
        "soup.lag=8 soup.max_age=8",
        "soup.lag=8 soup.max_age=11 soup.source=snapshot",
        "soup.max_age=1 soup.source=replay",
        "soup.max_age=1 soup.source=snapshot snapshot.policy=pool",
        "soup.mixed_share=0 soup.max_age=1",
        f"{GROW} schedules.mixed_share.end=1 schedules.mixed_share.steps=2",
        "schedules.mixed_share.warmup=100",
        "schedules.prefix_length.shape=cosine schedules.prefix_length.end=23",
        "schedules.prefix_length.shape=cosine schedules.prefix_length.end=0",
        "schedules.lag.shape=cosine schedules.lag.end=0 schedules.lag.warmup=4",
        "soup.source=snapshot schedules.lag.shape=linear schedules.lag.end=30",
        "soup.ratio=behavior loss=vanilla estimator=grpo",
        "soup.ratio=decoupled loss=vanilla",
        "correction.bypass_mode=true",
        "correction.bypass_mode=true soup.prefix_gradient=0",
        "soup.mixed_share=0 estimator=gae",  # nothing is mixed, so nothing has to fit
        "soup.lag=0 estimator=gae",
    ],
)
def test_within_its_bounds(example: Compose, overrides: str) -> None:
    check_config(example(*map(spelled_out, overrides.split())))


def test_what_is_refused_because_it_mixes_is_refused_if_only_its_schedule_mixes(example: Compose) -> None:
    schedule = ["soup.mixed_share=0", GROW, "schedules.mixed_share.end=0.5", "estimator=gae"]
    assert "algorithm.adv_estimator=gae" in sentence(check_config, example(*map(spelled_out, schedule)))


def test_no_clip_is_spelled_inf_on_the_command_line(composed: Compose) -> None:
    config = composed(*BASE, "algorithm.soup.prefix_clip.high=inf")
    check_config(config)
    assert parse_settings(config.algorithm.soup, 24).prefix_clip.high == float("inf")


def test_the_largest_lag_of_a_schedule_decides_how_many_snapshots_are_kept(example: Compose) -> None:
    overrides = ["soup.source=snapshot", "soup.lag=2", "schedules.lag.shape=linear", "schedules.lag.end=17"]
    config = example(*map(spelled_out, overrides))
    assert parse_settings(config.algorithm.soup, 24).snapshot.keep == 5  # 16 updates behind the newest, every 4


@pytest.mark.parametrize("resume", ["auto", "resume_path"])
@pytest.mark.parametrize("mode", ASYNC_TRAINER_MODES)
def test_what_was_under_way_is_taken_over_by_an_async_trainer_only(
    example: Compose, tmp_path: Path, mode: str, resume: str
) -> None:
    """And not without its prefixes, which are in the prompts and samples that verl saves."""
    overrides = [f"trainer.v1.trainer_mode={mode}", f"trainer.default_local_dir={tmp_path}"]
    folder = tmp_path / "global_step_4"
    (folder / "actor").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    PrefixBank().save(folder / BANK_FILE, {}, 0, {})
    overrides += [f"trainer.resume_mode={resume}", f"trainer.resume_from_path={folder}"]
    fresh, sync = "algorithm.soup.resume_bank=fresh", "trainer.v1.trainer_mode=soup"
    for accepted in ([], [fresh], [sync]):  # the checkpoint of a synchronous trainer
        check_config(example(*overrides, *accepted))
    (folder / "transfer_queue").mkdir()
    check_config(example(*overrides))
    unmixed = "algorithm.soup.mixed_share=0"
    for refused, advice in (
        (fresh, "set it to strict"),
        (sync, "soup_colocate_async and soup_separate_async"),
        (unmixed, "only a run that mixes corrects"),
    ):
        text = sentence(check_config, example(*overrides, refused))
        assert text.startswith(f"{refused}: ")
        assert str(folder) in text
        assert advice in text
    check_config(example(*overrides, fresh, "trainer.resume_mode=disable"))
    PrefixBank().save(folder / BANK_FILE, {SOURCE: NOTHING}, 0, {})
    check_config(example(*overrides, unmixed))  # the twin goes on with its own


@pytest.mark.parametrize(("bank", "why"), [("older", "before it said what shaped"), ("torn", ""), ("none", "")])
@pytest.mark.parametrize("mode", ASYNC_TRAINER_MODES)
def test_what_was_under_way_of_who_knows_which_run_is_taken_over_by_none(
    example: Compose, tmp_path: Path, mode: str, bank: str, why: str
) -> None:
    """An older version did not save what shaped prefixes; a run that mixes nothing would train on them as its own."""
    folder = tmp_path / "global_step_4"
    for part in ("actor", "transfer_queue"):
        (folder / part).mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    if bank == "older":
        np.savez(folder / BANK_FILE, format=np.array(1))
    elif bank == "torn":
        (folder / BANK_FILE).write_text("torn")
    overrides = [f"trainer.v1.trainer_mode={mode}", f"trainer.default_local_dir={tmp_path}", "trainer.resume_mode=auto"]
    for share in ("0.5", "0"):
        text = sentence(check_config, example(*overrides, f"algorithm.soup.mixed_share={share}"))
        assert text.startswith(f"trainer.default_local_dir={folder}: "), text
        assert why in text
    assert "does not say whether they bring prefixes" in text
    assert "start in another folder" in text


def test_a_hub_name_without_network_is_refused(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refusal = sentence(check_config, composed(*BASE, "actor_rollout_ref.model.path=nobody/nothing"))
    assert "download it first, or run with HF_HUB_OFFLINE=0" in refusal


@pytest.mark.parametrize(
    ("name", "content"),
    [("train.parquet", "version https://git-lfs.github.com/spec/v1"), ("train.csv", "prompt\nx"), ("train.json", "{")],
)
def test_a_dataset_that_cannot_be_read_is_refused(composed: Compose, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert "cannot be read as" in sentence(check_config, composed(*BASE, f"data.train_files={tmp_path / name}"))
    assert "cannot be read as a dataset" in sentence(check_config, composed(*BASE, f"data.train_files={tmp_path}"))


def test_a_check_that_breaks_stops_the_run(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise KeyError("missing")

    monkeypatch.setattr("recipe.soup.checks.config.check_config", broken)
    with pytest.raises(SystemExit, match=r"KeyError.*bug of ours"):
        RefuseWrongConfig().on_job_start(composed(*BASE))


@pytest.mark.parametrize("column", ["__do_sample__", "__rollout_n__"])
@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_a_dataset_that_would_bypass_us_is_refused(composed: Compose, tmp_path: Path, column: str, suffix: str) -> None:
    path = tmp_path / f"train{suffix}"
    frame = pd.DataFrame({"prompt": ["x"], column: [1]})
    frame.to_parquet(path) if suffix == ".parquet" else frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    assert column in sentence(check_config, composed(*BASE, f"data.train_files={path}"))
    if suffix == ".json":  # verl reads lines there, too
        frame.to_json(path, orient="records", lines=True)
        assert column in sentence(check_config, composed(*BASE, f"data.train_files={path}"))


def test_files_of_a_dataset_class_of_ones_own_are_its_own_affair(composed: Compose) -> None:
    check_config(composed(*BASE, "data.custom_cls.path=x.py", "data.train_files=some/hub_name"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["snapshot.policy=newest"], ["algorithm.soup.snapshot.policy=newest", "lagged, pool, base, best"]),
        (["snapshot.policy=/nowhere"], ["algorithm.soup.snapshot.policy=/nowhere", "no such folder"]),
        (["snapshot.n_gpus=2"], ["algorithm.soup.snapshot.n_gpus=2", "null"]),
        (["snapshot.n_gpus=0", "snapshot.placement=standalone"], ["snapshot.n_gpus=0", "multiple"]),
    ],
)
def test_snapshots_that_cannot_be_are_refused(composed: Compose, overrides: list[str], words: list[str]) -> None:
    soup = [f"algorithm.soup.{override}" for override in ["source=snapshot", *overrides]]
    text = sentence(check_config, composed(*BASE, *soup))
    assert all(word in text for word in words), text
    check_config(composed(*BASE, *soup, "algorithm.soup.source=replay"))


def test_adapters_that_are_not_merged_have_no_snapshot(composed: Compose) -> None:
    overrides = ["algorithm.soup.source=snapshot", "actor_rollout_ref.model.lora_rank=8"]
    assert "actor_rollout_ref.model.lora.merge=False" in sentence(check_config, composed(*BASE, *overrides))
    check_config(composed(*BASE, *overrides, "actor_rollout_ref.model.lora.merge=True"))


def test_whole_responses_end_with_their_end(composed: Compose) -> None:
    whole = [*BASE, "algorithm.soup.source=replay", "algorithm.soup.prefix_length.distribution=whole"]
    check_config(composed(*whole))
    assert "algorithm.soup.on_eos=cut" in sentence(check_config, composed(*whole, "algorithm.soup.on_eos=cut"))


def test_weights_without_safetensors_are_refused(composed: Compose, tmp_path: Path) -> None:
    overrides = ["algorithm.soup.source=snapshot", f"algorithm.soup.snapshot.policy={tmp_path}"]
    assert "model_merger" in sentence(check_config, composed(*BASE, *overrides))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    check_config(composed(*BASE, *overrides))


def test_as_many_snapshots_are_kept_as_the_lag_needs(composed: Compose) -> None:
    config = composed(*BASE, "algorithm.soup.source=snapshot", "algorithm.soup.lag=9")
    assert parse_settings(config.algorithm.soup, 24).snapshot.keep == 3  # 8 updates behind the newest, every 4


def test_prefix_bounds_do_not_matter_without_mixing(composed: Compose) -> None:
    check_config(composed(*BASE, "algorithm.soup.mixed_share=0", "data.max_response_length=1"))


@pytest.mark.parametrize(("group", "refuses"), [("soup", True), ("grpo", False), ("verl", False), (None, False)])
def test_only_soup_refuses(group: str | None, refuses: bool) -> None:
    overrides = [f"algorithm={group}"] if group else []
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides, return_hydra_config=True)
    assert ("soup" in config.hydra.callbacks) == refuses


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*BASE, "algorithm.soup.lag=-3"], "algorithm.soup.lag=-3"),
        (["algorithm=grpo", "example=countdown", "hardware='cpu'"], "hardware=cpu"),
    ],
)
def test_the_command_ends_with_one_sentence_before_ray_starts(
    overrides: list[str], words: str, tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]
    result = subprocess.run(command, cwd=tmp_path, env=clean_environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert words in result.stderr.splitlines()[-1]
    assert not re.search("Traceback|ray init", result.stderr + result.stdout)
