"""What `source=dataset` refuses at start: tokens of which no policy is known."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import DictConfig
from refusals import changing, sentence

from recipe.soup.bank_origin import bank_origin
from recipe.soup.checks.config import check_config

SOUP, CORRECTION = "algorithm.soup", "algorithm.rollout_correction"
GATE = f"{SOUP}.demonstrations.gate"
WHOLE = f"{SOUP}.prefix_length.distribution=whole"


@pytest.fixture(scope="module")
def example(
    composed: Callable[..., DictConfig], countdown_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., DictConfig]:
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    rows = pd.read_parquet(countdown_dir / "data/train.parquet").head(64)
    rows["target"] = [[{"role": "assistant", "content": "1+1=2"}]] * len(rows)
    rows["reward_model"] = [{**cell, "candidates": ["1+1=2"]} for cell in rows["reward_model"]]
    rows.to_parquet(path)
    overrides = ("algorithm=soup", "hardware=cpu", "example=countdown", f"data.train_files={path}")
    return changing(composed(*overrides, f"{SOUP}.source=dataset", f"{SOUP}.ratio=luffy"))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [WHOLE],
        [f"{SOUP}.ratio=detached", f"{SOUP}.prefix_gradient=0.2", f"{SOUP}.baseline=separate"],
        [f"{SOUP}.ratio=nll", f"{SOUP}.nll_coefficient=0.001", f"{SOUP}.demonstrations.list=steps"],
        [f"{SOUP}.ratio=nll", f"{SOUP}.prefix_gradient=0", f"{SOUP}.samples_per_prefix=4", f"{SOUP}.on_eos=cut"],
        [f"{GATE}=unsolved", "algorithm.adv_estimator=rloo", "algorithm.filter_groups.enable=true",
         "algorithm.filter_groups.metric=acc", "data.gen_batch_size=1"],
        [f"{GATE}=successes", f"{SOUP}.demonstrations.gate_successes=2", WHOLE, f"{SOUP}.ratio=nll"],
        [f"{SOUP}.demonstrations.column=reward_model.candidates"],
        [f"{SOUP}.schedules.mixed_share.shape=cosine", f"{SOUP}.schedules.mixed_share.end=0"],
        # What there would be to refuse does not matter without mixing.
        [f"{SOUP}.mixed_share=0", f"{SOUP}.demonstrations.column=nowhere", f"{CORRECTION}.rollout_is=token"],
    ],
)  # fmt: skip
def test_accepted(example: Callable[..., DictConfig], overrides: list[str]) -> None:
    check_config(example(*overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{SOUP}.ratio=behavior"], [f"{SOUP}.ratio=behavior: ", "no policy is known", "detached, luffy, nll"]),
        ([f"{SOUP}.ratio=decoupled"], [f"{SOUP}.ratio=decoupled: ", "detached, luffy, nll"]),
        ([f"{SOUP}.ratio=shaped"], [f"{SOUP}.ratio=shaped: ", "detached, luffy, nll"]),
        ([f"{SOUP}.second_moment=0.04"], [f"{SOUP}.second_moment=0.04: ", "use null"]),
        ([f"{SOUP}.behavior_log_probs=trainer"], [f"{SOUP}.behavior_log_probs=trainer: ", "use auto"]),
        ([f"{SOUP}.lag_distribution=uniform"], [f"{SOUP}.lag_distribution=uniform: ", "source=dataset has no lag"]),
        ([f"{SOUP}.selection=entropic", f"{SOUP}.candidates=2"], [f"{SOUP}.selection=entropic: ", "use random"]),
        ([f"{SOUP}.selection=successful"], [f"{SOUP}.selection=successful: "]),
        ([f"{GATE}=successes"], [f"{GATE}=successes: ", "ratio=nll", "whole"]),
        ([f"{GATE}=successes", f"{SOUP}.ratio=nll"], [f"{GATE}=successes: ", "whole"]),
        ([f"{GATE}=sometimes"], [f"{GATE}=sometimes: ", "always, unsolved, successes"]),
        ([f"{SOUP}.demonstrations.gate_successes=-1"], ["gate_successes=-1: ", "0 or more"]),
        ([f"{SOUP}.nll_coefficient=0"], [f"{SOUP}.nll_coefficient=0: ", "above 0"]),
        ([WHOLE, f"{SOUP}.prefix_gradient=0"], [f"{SOUP}.prefix_gradient=0", "teach nothing"]),
        ([f"{SOUP}.source=replay", f"{SOUP}.ratio=nll"], [f"{SOUP}.ratio=nll: ", "source=dataset"]),
        ([f"{SOUP}.source=replay", f"{GATE}=unsolved"], [f"{GATE}=unsolved: ", "source=dataset"]),
        ([f"{SOUP}.demonstrations.column=hint"], [f"{SOUP}.demonstrations.column=hint: ", "no such column", "target"]),
        ([f"{SOUP}.demonstrations.column=reward_model.hint"], ["column=reward_model.hint: ", "no such column"]),
        ([f"{CORRECTION}.bypass_mode=true"], [f"{CORRECTION}.bypass_mode=True: ", "set it to False"]),
        ([f"{CORRECTION}.rollout_is=token"], [f"{CORRECTION}.rollout_is=token: ", "nobody knows", "set it to null"]),
        ([f"{CORRECTION}.rollout_rs=token_k1"], [f"{CORRECTION}.rollout_rs=token_k1: ", "reject"]),
        ([f"{GATE}=unsolved", "algorithm.adv_estimator=gpg"], ["algorithm.adv_estimator=gpg: ", f"{GATE}=unsolved"]),
        (["trainer.v1.trainer_mode=soup_colocate_async"], ["interrupted responses"]),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=gspo"], ["loss_mode=gspo: ", "set it to soup"]),
    ],
)
def test_refused(example: Callable[..., DictConfig], overrides: list[str], words: list[str]) -> None:
    text = sentence(check_config, example(*overrides))
    assert all(word in text for word in words), text


def test_with_tools_it_is_refused(example: Callable[..., DictConfig]) -> None:
    loop = "actor_rollout_ref.rollout.agent.default_agent_loop=soup_tool_agent"
    tools = "actor_rollout_ref.rollout.multi_turn.function_tool_path=pkg/tools.py"
    text = sentence(check_config, example(loop, tools, "actor_rollout_ref.rollout.multi_turn.enable=true"))
    assert "default_agent_loop=soup_tool_agent: demonstrations have not been tried with tools yet" in text


def test_nothing_is_kept_so_a_resumed_run_may_change_all_but_the_source(example: Callable[..., DictConfig]) -> None:
    assert bank_origin(example()) == bank_origin(example("data.seed=7", WHOLE)) == {f"{SOUP}.source": "dataset"}
