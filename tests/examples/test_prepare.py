"""`python -m examples.data.prepare`: what it writes is read by verl and by the lab."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset

from examples.data.prepare import main, prepare
from recipe.soup.mathematics.datasets import DAPO_AFTER, DAPO_BEFORE, INSTRUCTION
from recipe.soup.verl_adapter.problems import read_problems

PROBLEMS = [("What is $1+1$?", "2"), ("Halve $1$.", r"\frac{1}{2}"), ("Find $x$.", "-3")]
Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, "the network, in a test"  # verl's filter talks to a process of its own
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def math500(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"problem": problem, "answer": answer}) for problem, answer in PROBLEMS))
    return path


@pytest.fixture
def dapo(tmp_path: Path) -> Path:
    answers = [*PROBLEMS, *PROBLEMS, ("Find $x$.", "4")]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{DAPO_BEFORE}\n\n{problem}\n\n{DAPO_AFTER}"}],
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        }
        for problem, answer in answers
    ]
    path = tmp_path / "dapo.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    main()


def test_verl_reads_it(math500: Path, tmp_path: Path, countdown_dir: Path) -> None:
    path = prepare("math500", tmp_path / "data", math500)
    tokenizer = AutoTokenizer.from_pretrained(countdown_dir / "base_model")
    config = OmegaConf.create({"max_prompt_length": 200, "filter_overlong_prompts": True, "cache_dir": str(tmp_path)})
    dataset = RLHFDataset(str(path), tokenizer, config)
    assert len(dataset) == len(PROBLEMS)
    for index, (problem, answer) in enumerate(PROBLEMS):
        row = dataset[index]
        assert row["raw_prompt"] == [{"role": "user", "content": problem + INSTRUCTION}]
        assert row["reward_model"]["ground_truth"] == answer
        assert (row["data_source"], row["index"], row["extra_info"]["split"]) == ("math500", index, "test")


def test_lab_and_evaluation_read_it(dapo: Path, tmp_path: Path, composed: Any) -> None:
    path = prepare("dapo_math_17k", tmp_path / "data", dapo)
    problems = read_problems(composed(f"data.val_files={path}", "data.shuffle=false"), "val", None)
    assert [problem.messages for problem in problems] == [
        [{"role": "user", "content": problem + INSTRUCTION}] for problem, _ in PROBLEMS
    ]
    assert [problem.ground_truth for problem in problems] == [answer for _, answer in PROBLEMS]


def test_it_says_what_it_wrote_and_what_it_left_out(
    dapo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    run(monkeypatch, "dapo_math_17k", "--from", dapo, "--out", tmp_path, "--limit", 2)
    assert capsys.readouterr().out.splitlines() == [
        f"dapo_math_17k: 2 problems in {tmp_path}/dapo_math_17k.parquet",
        "  1 more left out (--limit 2)",
        "  4 rows left out because their problem was there before",
        "  1 of them with another answer than the one that is kept",
        "  the first one:",
        "    What is $1+1$?",
        "    Please reason step by step, and put your final answer within \\boxed{}.",
        "  its answer: 2",
    ]
    assert len(pd.read_parquet(tmp_path / "dapo_math_17k.parquet")) == 2


def test_several_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    rows = [{"problem": "?", "question": "?", "answer": "1"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    run(monkeypatch, "math500", "amc23", "--out", tmp_path)
    assert {path.name for path in tmp_path.glob("*.parquet")} == {"math500.parquet", "amc23.parquet"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("math500", "amc23", "--from", "rows.parquet"), "--from=rows.parquet: is one dataset's file"),
        (("math500", "--limit", "0"), "--limit=0: must be at least 1"),
        (("math500", "maths"), "maths: no such dataset"),
        (("math500", "--from", "none.parquet"), "no such file"),
    ],
)
def test_what_cannot_be_done_is_refused(
    arguments: tuple[str, ...], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("loaded before it was refused"))
    with pytest.raises(SystemExit, match=why):
        run(monkeypatch, *arguments, "--out", tmp_path)
    assert not list(tmp_path.glob("*.parquet"))


def test_help_names_all_datasets(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    printed = capsys.readouterr().out
    assert "HuggingFaceH4/MATH-500, test" in printed
    assert "python -m examples.data.prepare dapo_math_17k math500 --out data" in printed
