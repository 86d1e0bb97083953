"""Agent loops that cannot be, and what tools cannot be combined with: one sentence each, and what is accepted."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import DictConfig
from refusals import changing, sentence

from recipe.soup.checks.callbacks import RefuseWrongSettings
from recipe.soup.checks.config import check_config
from recipe.soup.checks.loops import check_loops
from recipe.soup.lab.refusals import check_lab_config

Compose = Callable[..., DictConfig]
ROLLOUT = "actor_rollout_ref.rollout"
LOOP = f"{ROLLOUT}.agent.default_agent_loop"
ENABLE = f"{ROLLOUT}.multi_turn.enable"
FILE = "function_tool_path"


@pytest.fixture(scope="module")
def one_turn(composed: Compose) -> Callable[..., DictConfig]:
    return changing(composed("algorithm=soup", "hardware=cpu", "example=countdown"))


@pytest.fixture(scope="module")
def tools(composed: Compose) -> Callable[..., DictConfig]:
    return changing(composed("algorithm=soup", "hardware=cpu", "example=countdown_tool"))


@pytest.mark.parametrize("algorithm", ["soup", "grpo", "verl"])
@pytest.mark.parametrize("example", ["countdown", "countdown_tool"])
def test_the_loop_is_the_one_that_multi_turn_asks_for(composed: Compose, algorithm: str, example: str) -> None:
    loops = {
        "verl": {"countdown": "single_turn_agent", "countdown_tool": "tool_agent"},
        "ours": {"countdown": "soup_agent", "countdown_tool": "soup_tool_agent"},
    }
    config = composed(f"algorithm={algorithm}", "hardware=cpu", f"example={example}")
    assert (
        config.actor_rollout_ref.rollout.agent.default_agent_loop
        == (loops["verl" if algorithm == "verl" else "ours"][example])
    )
    if algorithm != "verl":
        RefuseWrongSettings().on_job_start(config)
    if algorithm == "soup":
        check_config(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"{LOOP}=tool_agent"], [f"{LOOP}=tool_agent: ", "soup_tool_agent for tools"]),
        ([f"{LOOP}=react_agent"], [f"{LOOP}=react_agent: ", "set it to soup_agent"]),
        ([f"{LOOP}=soup_agent", f"{ENABLE}=true"], [f"{ENABLE}=True: ", f"set {ENABLE} to False"]),
        ([f"{ENABLE}=true"], [f"multi_turn.{FILE}=None: ", "no tools to call; name a file"]),
        ([f"{LOOP}=soup_tool_agent"], [f"multi_turn.{FILE}=None: ", "no tools to call; name a file"]),
        ([f"{ROLLOUT}.agent.agent_loop_config_path=x.yaml"], ["agent_loop_config_path=x.yaml: ", "several outputs"]),
        ([f"{ROLLOUT}.multi_turn.{FILE}=/tools.py"], [f"{FILE}=/tools.py: ", f"set {ENABLE} to True"]),
        ([f"data.{FILE}=/tools.py"], [f"data.{FILE}=/tools.py: ", f"set {ENABLE} to True"]),
        (["data.tool_config_path=t.yaml"], ["data.tool_config_path=t.yaml: ", f"set {ENABLE} to True"]),
        ([f"{ENABLE}=true", f"{ROLLOUT}.multi_turn.{FILE}=/tools.py"], [f"{FILE}=/tools.py: ", "no such file"]),
    ],
)
def test_refused_mixed_or_not(one_turn: Compose, overrides: list[str], words: list[str]) -> None:
    for share in (0.5, 0):
        text = sentence(check_config, one_turn(*overrides, f"algorithm.soup.mixed_share={share}"))
        for word in words:
            assert word in text
    config = one_turn(*overrides)
    with pytest.raises(SystemExit, match=re.escape(words[0])):
        RefuseWrongSettings().on_job_start(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.soup.on_eos=cut"], ["algorithm.soup.on_eos=cut: ", "ends the call of a tool", "use keep"]),
        (
            ["algorithm.soup.source=replay", "algorithm.soup.prefix_length.distribution=whole"],
            ["algorithm.soup.prefix_length.distribution=whole: ", "uniform"],
        ),
        (["algorithm.soup.source=snapshot"], ["algorithm.soup.source=snapshot: ", "use lookahead or replay"]),
        (["trainer.v1.trainer_mode=soup_colocate_async"], ["trainer.v1.trainer_mode=soup_colocate_async: ", "to soup"]),
    ],
)
def test_refused_with_tools_only(one_turn: Compose, tools: Compose, overrides: list[str], words: list[str]) -> None:
    text = sentence(check_config, tools(*overrides))
    for word in words:
        assert word in text
    check_config(one_turn(*overrides))
    check_config(tools(*overrides, "algorithm.soup.mixed_share=0"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.soup.source=replay"],
        ["algorithm.soup.source=replay", "algorithm.soup.selection=steered"],
        ["algorithm.soup.behavior_log_probs=trainer"],
        ["algorithm.soup.ratio=shaped", "algorithm.soup.baseline=separate"],
        [f"{ROLLOUT}.multi_turn.max_assistant_turns=2"],
        [f"{ROLLOUT}.multi_turn.{FILE}=tools.py"],  # relative: verl looks in its own folder as well
    ],
)
def test_accepted_with_tools(tools: Compose, overrides: list[str]) -> None:
    check_config(tools(*overrides))


def dataset(folder: Path, suffix: str, *names: str | None) -> str:
    path = folder / f"train{suffix}"
    frame = pd.DataFrame({"prompt": [[{"role": "user", "content": "x"}]] * len(names), "agent_name": names})
    frame.to_parquet(path) if suffix == ".parquet" else frame.to_json(path, orient="records", lines=suffix == ".jsonl")
    return f"data.train_files={path}"


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_rows_may_ask_for_the_loop_that_the_run_has(
    one_turn: Compose, tools: Compose, tmp_path: Path, suffix: str
) -> None:
    """By verl's name or by ours; but for no other, and for none that is not ours."""
    for config, verls, ours in (
        (one_turn, "single_turn_agent", "soup_agent"),
        (tools, "tool_agent", "soup_tool_agent"),
    ):
        check_config(config(dataset(tmp_path, suffix, verls, ours, verls)))
        for name in ("react_agent", None):
            text = sentence(check_config, config(dataset(tmp_path, suffix, verls, name)))
            assert f"asks for {name}, which would bypass SOUP's agent loop" in text
            assert str(tmp_path / f"train{suffix}") in text
    text = sentence(check_loops, one_turn(dataset(tmp_path, suffix, "single_turn_agent", "tool_agent")))
    assert f"asks for tool_agent, and this run has soup_agent for all rows; set {ENABLE} to True" in text
    text = sentence(check_loops, tools(dataset(tmp_path, suffix, "tool_agent", "single_turn_agent")))
    assert f"set {ENABLE} to False" in text


def test_the_lab_has_no_tools(composed: Compose, one_turn: Any) -> None:
    check_lab_config(one_turn())
    for override in (f"{LOOP}=soup_tool_agent", f"data.{FILE}=x.py"):
        assert "or use main_ppo" in sentence(check_lab_config, one_turn(override))
