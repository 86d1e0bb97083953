"""Countdown's calculator and the parser of its calls."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from verl.experimental.agent_loop.tool_parser import ToolParser
from verl.tools.function_tool import FunctionTool, load_function_tools_from_path

from examples.countdown.reward import compute_score

TRUTH = {"numbers": [3, 5, 7], "target": 22}


@pytest.fixture
def calculator(countdown_dir: Path) -> FunctionTool:
    [tool] = load_function_tools_from_path(str(countdown_dir / "calculator.py"))
    return tool


@pytest.fixture
def parser(countdown_dir: Path, calculator: FunctionTool) -> ToolParser:
    """The file of the tool registers it."""
    return ToolParser.get_tool_parser("countdown", AutoTokenizer.from_pretrained(countdown_dir / "base_model"))


def calls(parser: ToolParser, text: str) -> list[dict[str, Any]]:
    ids: Any = parser.tokenizer.encode(text)
    found, read = asyncio.run(parser.extract_tool_calls(ids)), []
    assert found[0] == text.replace("<eos>", "")
    for call in found[1]:
        assert call.name == "calculator"
        read.append(json.loads(call.arguments))
    return read


@pytest.mark.parametrize(
    ("text", "step"),
    [("3*5=", (3, "*", 5)), (",15+7=", (15, "+", 7)), (",12-1=", (12, "-", 1)), ("22,1+2=", (1, "+", 2))],
)
def test_a_turn_that_ends_with_a_step_calls_the_calculator(
    parser: ToolParser, text: str, step: tuple[int, str, int]
) -> None:
    assert calls(parser, text) == [dict(zip(("a", "operation", "b"), step, strict=True))]


@pytest.mark.parametrize("text", ["<eos>", "3*5", "=", "3*=", "3=", "3*5=15", "3*5=<eos>,", " :", "12345*6="])
def test_other_turns_call_nothing(parser: ToolParser, text: str) -> None:
    """Nor do numbers that are longer than any of the task: the end of one would be another number."""
    assert calls(parser, text) == []


def test_the_engine_stops_at_the_equals_sign(parser: ToolParser) -> None:
    assert parser.tokenizer.decode(parser.stop_token_ids) == "="


@pytest.mark.parametrize(("step", "answer"), [((3, "*", 5), "15"), ((3, "-", 5), "-2"), ((9, "+", 8), "17")])
def test_the_calculator_computes(calculator: FunctionTool, step: tuple[int, str, int], answer: str) -> None:
    assert asyncio.run(calculator.call(dict(zip(("a", "operation", "b"), step, strict=True)))) == answer


def test_the_reward_is_countdowns_on_the_whole_text() -> None:
    assert compute_score("countdown", "3*5=15,15+7=22", TRUTH) == 1.0
    assert compute_score("countdown", "3*5=15,15-7=8", TRUTH) == 0.0
