"""What is left to `auto` is decided once, from the whole config, and said in one line."""

from typing import Any

import pytest

from recipe.soup.checks.callbacks import RefuseWrongConfig
from recipe.soup.run_settings import in_float32, run_settings, what_auto_means

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
GPU = ("algorithm=soup", "example=countdown")  # verl's own types: bfloat16
CPU = (*GPU, "hardware=cpu")


@pytest.mark.parametrize(
    ("overrides", "who"),
    [
        ([], "trainer"),
        (["source=replay"], "trainer"),
        (["ratio=decoupled"], "trainer"),
        (["ratio=shaped"], "trainer"),
        (["ratio=luffy"], "rollout"),
        (["ratio=detached"], "rollout"),
        (["ratio=detached", "second_moment=0.1"], "trainer"),
        (["source=snapshot"], "rollout"),
        (["mixed_share=0"], "rollout"),
        (["behavior_log_probs=rollout"], "rollout"),
        (["behavior_log_probs=trainer"], "trainer"),
    ],
)
def test_who_computes_them_where_numbers_are_rounded(overrides: list[str], who: str, composed: Any) -> None:
    config = composed(*GPU, *(f"algorithm.soup.{override}" for override in overrides))
    assert not in_float32(config)
    assert run_settings(config).behavior_log_probs == who


@pytest.mark.parametrize(
    "override", ["trainer.v1.trainer_mode=soup_colocate_async", "algorithm.rollout_correction.bypass_mode=true"]
)
def test_what_the_trainer_cannot_do_is_not_chosen(override: str, composed: Any) -> None:
    assert run_settings(composed(*GPU, override)).behavior_log_probs == "rollout"


def test_in_float32_the_engine_says_the_same(composed: Any) -> None:
    assert run_settings(composed(*CPU)).behavior_log_probs == "rollout"
    for key, value in (
        (f"{ROLLOUT}.dtype", "bfloat16"),
        (f"{ACTOR}.fsdp_config.mixed_precision.param_dtype", "bf16"),
        (f"{ACTOR}.fsdp_config.mixed_precision", "null"),
    ):
        assert run_settings(composed(*CPU, f"{key}={value}")).behavior_log_probs == "trainer", key


def test_the_start_says_it_in_one_line(composed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    RefuseWrongConfig().on_job_start(composed(*GPU))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "behavior_log_probs" in line]
    assert line.startswith(
        "algorithm.soup.behavior_log_probs=auto: trainer, since engine and trainer round differently"
    )
    assert what_auto_means(composed(*GPU, "algorithm.soup.behavior_log_probs=trainer")) is None
    assert what_auto_means(composed(*GPU, "algorithm.soup.mixed_share=0")) is None


def test_types_that_are_no_group_of_keys_are_refused(composed: Any) -> None:
    config = composed(*GPU, f"+{ACTOR}.fsdp_config.mixed_precision=[1]")
    with pytest.raises(SystemExit, match=r"fsdp_config\.mixed_precision=\[1\]: is a group of keys"):
        run_settings(config)
