"""Rewards outside verl's trainer: the same grades as verl's own workers give, whatever people write."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager

from recipe.soup.records.problems import Problem
from recipe.soup.verl_adapter.grader import Grader, Response

PATH = "reward.custom_reward_function.path"
TEXTS = ["3+5=8", "3*5", "-"]
ROW = {"data_source": "countdown", "reward_model": {"ground_truth": {"target": 22}}, "extra_info": {"index": 3}}

GRADES = {
    "as verl documents it": "def compute_score(data_source, solution_str, ground_truth, extra_info=None): return {}",
    "another order": "def compute_score(solution_str, extra_info, ground_truth=None, data_source=''): return {}",
    "keywords only": "def compute_score(*, data_source, solution_str, ground_truth, extra_info): return {}",
    "any keywords": "def compute_score(**given):\n    solution_str = given['solution_str']\n    return {}",
    "any beside": "def compute_score(solution_str, **rest): return {}",
    "asynchronous": "async def compute_score(data_source, solution_str, ground_truth, extra_info): return {}",
}
VALUES = {
    "number": "float('+' in solution_str)",
    "truth": "np.bool_('+' in solution_str)",
    "below 0": "1 if '+' in solution_str else -1",
    "dictionary": "{'score': 0.5, 'acc': '+' in solution_str, 'pred': solution_str[-1:]}",
    "odd dictionary": "{'score': 1.0, 'parts': np.array([1.0, 2.0]), 'seen': {1, 2}, 'why': None}",
    "keys that differ": "{'score': 1.0, 'pred': 'a'} if '+' in solution_str else 0.0",
}


def write(folder: Path, function: str) -> str:
    path = folder / "reward.py"
    path.write_text(f"import numpy as np\n{textwrap.dedent(function)}\n")
    return f"{PATH}={path}"


def by_verl(config: DictConfig, countdown_dir: Path, text: str, row: dict[str, Any]) -> dict[str, Any]:
    """As verl's reward worker grades what its agent loop sends it: token ids, and the columns of the row."""
    tokenizer = AutoTokenizer.from_pretrained(countdown_dir / "base_model")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    batch = TensorDict({"responses": ids[None], "attention_mask": torch.ones_like(ids)[None]}, batch_size=1)
    columns = {**row, "extra_info": dict(row.get("extra_info") or {})}  # as verl's dataset fills it in
    data = DataProto(batch=batch, non_tensor_batch={key: np.array([value]) for key, value in columns.items()})
    manager: Any = load_reward_manager(config, tokenizer)
    return manager.loop.run_until_complete(manager.run_single(data))


def grade(config: DictConfig, row: dict[str, Any] = ROW, texts: list[str] = TEXTS) -> list[Any]:
    return Grader(config).grade(Response(Problem([], row), text, len(text)) for text in texts)


@pytest.mark.parametrize("signature", GRADES)
@pytest.mark.parametrize("value", VALUES)
def test_a_reward_is_verls_reward(
    signature: str, value: str, composed: Callable[..., DictConfig], countdown_dir: Path, tmp_path: Path
) -> None:
    config = composed(write(tmp_path, GRADES[signature].replace("return {}", f"return {VALUES[value]}")))
    for text, ours in zip(TEXTS, grade(config), strict=True):
        theirs = by_verl(config, countdown_dir, text, ROW)
        assert ours["score"] == float(theirs["reward_score"])
        told = {key: told for key, told in theirs["reward_extra_info"].items() if key != "score"}
        np.testing.assert_equal({key: told for key, told in ours.items() if key != "score"}, told)


def test_it_gets_what_verl_gives_it(composed: Callable[..., DictConfig], countdown_dir: Path, tmp_path: Path) -> None:
    function = """
        def compute_score(data_source, solution_str, ground_truth, extra_info, weight, **rest):
            bonus, truth = extra_info.get("index", 7), ground_truth["target"]
            extra_info["index"] = 100  # belongs to this sample alone
            return {"score": weight * bonus, "told": f"{data_source} {truth} {sorted(extra_info)} {sorted(rest)}"}
    """
    config = composed(write(tmp_path, function), "+reward.custom_reward_function.reward_kwargs.weight=2")
    for row in (ROW, {key: value for key, value in ROW.items() if key != "extra_info"}, {**ROW, "extra_info": None}):
        first, second, _ = grade(config, row)
        theirs = by_verl(config, countdown_dir, TEXTS[0], row)
        assert first == second == {"score": theirs["reward_score"], "told": theirs["reward_extra_info"]["told"]}


def test_without_a_function_verls_own_grades(composed: Callable[..., DictConfig]) -> None:
    row = {"data_source": "openai/gsm8k", "reward_model": {"ground_truth": "8"}}
    config = composed()
    assert [told["score"] for told in grade(config, row, ["#### 8", "#### 9"])] == [1.0, 0.0]
    assert Grader(config).source()


def test_another_manager_is_asked(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    function = "def compute_score(**given): return 1.0"
    overlong = "+reward.reward_kwargs.overlong_buffer_cfg={enable: true, len: 4, penalty_factor: 1.0, log: false}"
    config = composed(
        write(tmp_path, function),
        "reward.reward_manager.name=dapo",
        "data.max_response_length=8",
        overlong,
        "+reward.reward_kwargs.max_resp_len=8",
    )
    assert [told["score"] for told in grade(config, ROW, ["abcd", "abcdef"])] == [1.0, 0.5]


def test_an_asynchronous_reward_waits_for_all_answers_at_once(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    function = """
        import asyncio
        waiting = 0
        async def compute_score(**given):
            global waiting
            waiting += 1
            for _ in range(100):
                await asyncio.sleep(0.01)
                if waiting == 3:
                    return 1.0
            return 0.0
    """
    assert [told["score"] for told in grade(composed(write(tmp_path, function)))] == [1.0] * 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no unit')", "no unit"),
        ("return None", "the reward None is not one finite number"),
        ("return float('nan')", "the reward nan is not"),
        ("return {'score': -float('inf')}", "the reward -inf is not"),
        ("return (1.0, 'why')", "is not one finite number"),
        ("return np.array([1.0, 0.0])", "is not one finite number"),
        ("return '1.0'", "is not one finite number"),
        ("return {'reward': 1.0}", "score"),
    ],
)
def test_what_is_no_grade_is_told_apart(
    body: str, message: str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    function = f"def compute_score(solution_str, **rest):\n    if '+' in solution_str: {body}\n    return 0.25"
    failed, *others = grade(composed(write(tmp_path, function)))
    assert isinstance(failed, Exception)
    assert message in str(failed)
    assert [told["score"] for told in others] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("def compute_score(:", "SyntaxError"),
        ("raise RuntimeError('no key')", "RuntimeError: .*no key"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("def grade(**given): return 1.0", "compute_score"),
        ("def compute_score(response, answer): return 1.0", "with the keywords data_source, solution_str"),
        ("def compute_score(data_source, solution_str): return 1.0", "unexpected keyword argument"),
        ("def compute_score(question, **rest): return 1.0", "missing a required argument: 'question'"),
    ],
)
def test_what_cannot_be_called_is_told_before_anything_is_sampled(
    function: str, message: str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=rf"reward.custom_reward_function=.*reward.py.*{message}"):
        Grader(composed(write(tmp_path, function)))


def test_a_reward_may_be_an_object(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    function = """
        class Score:
            def __call__(self, solution_str, **rest):
                return float("+" in solution_str)
        compute_score = Score()
    """
    config = composed(write(tmp_path, function))
    assert [told["score"] for told in grade(config)] == [1.0, 0.0, 0.0]
    assert Grader(config).source()


def test_a_reward_model_is_refused(composed: Callable[..., DictConfig]) -> None:
    with pytest.raises(SystemExit, match=r"reward.reward_model.enable=True: a reward model needs an engine"):
        Grader(composed("reward.reward_model.enable=true"))


def test_rows_that_cannot_be_graded_are_refused(composed: Callable[..., DictConfig]) -> None:
    grader = Grader(composed())
    grader.require_columns([Problem([], ROW), Problem([], {**ROW, "reward_model": {"ground_truth": 0}})], "data", "x")
    for row, column in (
        ({"data_source": "x"}, "reward_model.ground_truth"),
        ({"data_source": "x", "reward_model": {"style": "rule"}}, "reward_model.ground_truth"),
        ({"reward_model": {"ground_truth": 1}}, "data_source"),
    ):
        with pytest.raises(SystemExit, match=f"data=x: a row lacks {column}"):
            grader.require_columns([Problem([], ROW), Problem([], row)], "data", "x")
