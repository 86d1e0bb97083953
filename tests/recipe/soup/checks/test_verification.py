"""What `selection=verified` cannot honour is refused at start, and what it can is not."""

from collections.abc import Callable

import pytest
from omegaconf import DictConfig
from refusals import changing, sentence

from recipe.soup.checks.callbacks import RefuseWrongConfig
from recipe.soup.checks.config import check_config
from recipe.soup.settings.soup import NO_HISTORY

SOUP, ROLLOUT = "algorithm.soup", "actor_rollout_ref.rollout"
RESIDUAL = (f"{SOUP}.verification.rejected=residual", f"{SOUP}.verification.leniency=1")


@pytest.fixture(scope="module")
def example(composed: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    overrides = ("algorithm=soup", "hardware=cpu", "example=countdown")
    return changing(composed(*overrides, f"{SOUP}.source=replay", f"{SOUP}.selection=verified"))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [f"{SOUP}.mixed_share=1", f"{SOUP}.verification.leniency=inf", f"{SOUP}.max_age=40"],
        [f"{SOUP}.schedules.mixed_share.shape=cosine", f"{SOUP}.schedules.mixed_share.end=0"],
        ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc", "data.gen_batch_size=1"],
        ["algorithm.adv_estimator=pass_at_k"],
        ["algorithm.rollout_correction.rollout_is=token"],
        ["actor_rollout_ref.model.lora_rank=4"],
        [f"{SOUP}.behavior_log_probs=trainer"],
        # What there would be to refuse does not matter without mixing.
        [f"{SOUP}.mixed_share=0", "algorithm.rollout_correction.bypass_mode=true"],
    ],
)
def test_accepted_on_both_paths(example: Callable[..., DictConfig], overrides: list[str]) -> None:
    check_config(example(*overrides))
    RefuseWrongConfig().on_job_start(example(*overrides))


def test_exact_replacement_is_accepted_by_the_lab_and_refused_by_main_ppo(example: Callable[..., DictConfig]) -> None:
    check_config(example(*RESIDUAL))
    text = sentence(lambda config: RefuseWrongConfig().on_job_start(config), example(*RESIDUAL))
    assert f"{SOUP}.verification.rejected=residual: " in text
    assert "only the lab" in text
    assert "set it to sampled" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{SOUP}.source=lookahead"], [f"{SOUP}.selection=verified: ", "source=replay"]),
        ([f"{SOUP}.verification.leniency=0"], [f"{SOUP}.verification.leniency=0: ", "above 0"]),
        ([RESIDUAL[0]], [f"{SOUP}.verification.rejected=residual: ", "leniency=1"]),
        ([f"{SOUP}.prefix_length.distribution=whole"], [f"{SOUP}.prefix_length.distribution=whole: ", "use uniform"]),
        ([f"{SOUP}.prefix_length.unit=fraction", f"{SOUP}.prefix_length.max=0.5"], ["unit=fraction: ", "use tokens"]),
        ([f"{SOUP}.schedules.prefix_length.warmup=3"], [f"{SOUP}.schedules.prefix_length.shape=", "warmup"]),
        ([f"{SOUP}.schedules.lag.shape=linear", f"{SOUP}.schedules.lag.end=3"], [f"{SOUP}.schedules.lag.shape="]),
        ([f"{SOUP}.samples_per_prefix=2"], [f"{SOUP}.samples_per_prefix=2: ", "use 1"]),
        ([f"{SOUP}.candidates=2"], [f"{SOUP}.candidates=2: ", "1."]),
        ([f"{SOUP}.on_eos=cut"], [f"{SOUP}.on_eos=cut: ", "use keep"]),
        (["algorithm.rollout_correction.bypass_mode=true"], ["bypass_mode=True: ", "scores old responses"]),
        (["trainer.v1.trainer_mode=soup_colocate_async"], ["trainer_mode=soup_colocate_async: ", "set it to soup"]),
    ],
)
def test_refused(example: Callable[..., DictConfig], overrides: list[str], words: list[str]) -> None:
    text = sentence(check_config, example(*overrides))
    for word in words:
        assert word in text


def test_tools_are_refused(example: Callable[..., DictConfig]) -> None:
    loop = f"{ROLLOUT}.agent.default_agent_loop=soup_tool_agent"
    tools = f"{ROLLOUT}.multi_turn.function_tool_path=examples/countdown/calculator.py"
    text = sentence(check_config, example(f"{ROLLOUT}.multi_turn.enable=true", loop, tools))
    assert text.startswith(f"{loop}: ")
    assert "cannot be verified" in text


OTHERS = {
    "ratio": "shaped",
    "prefix_clip.low": "0.1",
    "prefix_clip.high": "inf",
    "prefix_gradient": "0.5",
    "second_moment": "0.04",
    "stale_negatives.low": "0.9",
    "stale_negatives.high": "1.1",
    "loss_tokens": "trained",
    "continuation_weight": "min",
    "baseline": "separate",
}


@pytest.mark.parametrize("key", NO_HISTORY)
def test_keys_of_the_loss_that_concern_history_are_refused(example: Callable[..., DictConfig], key: str) -> None:
    text = sentence(check_config, example(f"{SOUP}.{key}={OTHERS[key]}"))
    assert text.startswith(f"{SOUP}.{key}={OTHERS[key]}: ")
    assert "no history" in text
    assert f"use {NO_HISTORY[key][1]}" in text
