"""Datasets from small files of the hub's columns. Nothing here may use the network."""

import json
import socket
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from recipe.soup.mathematics.datasets import DAPO_AFTER, DAPO_BEFORE, DATASETS, INSTRUCTION, load, load_counted

MATH500 = [
    {"problem": "What is $1+1$?", "solution": r"\boxed{2}", "answer": "2", "subject": "Algebra", "level": 1},
    {"problem": "Halve $1$.", "solution": r"\boxed{\frac{1}{2}}", "answer": r"\frac{1}{2}", "subject": "", "level": 1},
]


def dapo(problem: str, answer: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{DAPO_BEFORE}\n\n{problem}\n\n{DAPO_AFTER}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
    }


def olympiad(question: str, answers: list[str], context: str | None = None, unit: str | None = None) -> dict[str, Any]:
    return {
        "id": 1,
        "question": question,
        "solution": ["..."],
        "final_answer": answers,
        "context": context,
        "image_1": None,
        "is_multiple_answer": "," in answers[0],
        "unit": unit,
        "answer_type": "Numerical",
        "error": None,
    }


ROWS: dict[str, list[dict[str, Any]]] = {
    "math500": MATH500,
    "amc23": [{"id": 0, "question": "How far?", "answer": "27.0", "url": ""}],
    "minerva": [{"question": "How bright, in erg/s?", "answer": "4.5e33"}],
    "olympiadbench": [
        olympiad("Halve it.", [r"$\frac{1}{2}$"], context="A number is 1."),
        olympiad("Find all triples.", ["$(1,8,19), (2,7,13)$"], unit="cm"),
        olympiad("Find both.", ["$1$", "$2$"]),
    ],
    "gsm8k": [{"question": "How many?", "answer": "12 * 90 = <<12*90=1080>>1080\n#### 1,080"}],
    "dapo_math_17k": [dapo("Find $a+b$.", "34"), dapo("Find $c$.", "-3"), dapo("Find $a+b$.", "34")],
    "math": [
        {"problem": "Find it.", "level": "Level 5", "type": "Algebra", "solution": r"$\boxed{1}$, so $\boxed 2$."}
    ],
    "gsm8k_train": [{"question": "How many?", "answer": "So none.\n#### -2.5"}],
}
EXPECTED = {
    "math500": [("What is $1+1$?", "2"), ("Halve $1$.", r"\frac{1}{2}")],
    "amc23": [("How far?", "27.0")],
    "minerva": [("How bright, in erg/s?", "4.5e33")],
    "olympiadbench": [
        ("A number is 1.\nHalve it.", r"\frac{1}{2}"),
        ("Find all triples.", "(1,8,19), (2,7,13)"),
        ("Find both.", "1, 2"),
    ],
    "gsm8k": [("How many?", "1080")],
    "dapo_math_17k": [("Find $a+b$.", "34"), ("Find $c$.", "-3")],
    "math": [("Find it.", "2")],
    "gsm8k_train": [("How many?", "-2.5")],
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network, in a test")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(datasets, "load_dataset", refused)


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("name", DATASETS)
def test_rows_in_verls_columns(name: str, tmp_path: Path) -> None:
    rows = load(name, parquet(tmp_path / "rows.parquet", ROWS[name]))
    assert [row["prompt"] for row in rows] == [
        [{"role": "user", "content": problem + INSTRUCTION}] for problem, _ in EXPECTED[name]
    ]
    assert [row["reward_model"] for row in rows] == [
        {"style": "rule", "ground_truth": answer} for _, answer in EXPECTED[name]
    ]
    assert [row["extra_info"] for row in rows] == [
        {"split": DATASETS[name].split, "index": index} for index in range(len(rows))
    ]
    assert {(row["data_source"], row["ability"]) for row in rows} == {(name, "math")}
    assert all(list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info"] for row in rows)


@pytest.mark.parametrize("name", DATASETS)
def test_from_the_hub_they_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(repository: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((repository, config, split))
        return datasets.Dataset.from_list(ROWS[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load(name) == load(name, parquet(tmp_path / "rows.parquet", ROWS[name]))
    dataset = DATASETS[name]
    assert asked == [(dataset.repository, dataset.config, dataset.split)]


@pytest.mark.parametrize("name", ["math500", "amc23", "gsm8k", "olympiadbench", "dapo_math_17k"])
@pytest.mark.parametrize("file", ["rows.jsonl", "lines.json", "list.json"])
def test_json(name: str, file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    lines = [json.dumps(row) for row in ROWS[name]]
    path.write_text("[" + ",\n".join(lines) + "]" if file == "list.json" else "\n".join(lines) + "\n")
    assert load(name, path) == load(name, parquet(tmp_path / "rows.parquet", ROWS[name]))


def test_csv_leaves_answers_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nHow far?,027.50\n")
    assert load("amc23", path)[0]["reward_model"]["ground_truth"] == "027.50"


def test_numbers_are_written_plainly(tmp_path: Path) -> None:
    answers = [27.0, 0.1234567, 3.0]
    path = parquet(tmp_path / "rows.parquet", [{"question": "?", "answer": answer} for answer in answers])
    assert [row["reward_model"]["ground_truth"] for row in load("amc23", path)] == ["27", "0.1234567", "3"]


def test_a_folder_is_read_in_order_and_only_its_split(tmp_path: Path) -> None:
    for file, answer in (("test-00001-of-00002", "2"), ("test-00000-of-00002", "1"), ("train-00000-of-00001", "3")):
        parquet(tmp_path / f"{file}.parquet", [{"question": "?", "answer": f"#### {answer}"}])
    assert [row["reward_model"]["ground_truth"] for row in load("gsm8k", tmp_path)] == ["1", "2"]
    assert [row["reward_model"]["ground_truth"] for row in load("gsm8k_train", tmp_path)] == ["3"]
    for path in tmp_path.glob("train*"):
        path.unlink()
    with pytest.raises(SystemExit, match="no parquet files of the split 'train'"):
        load("gsm8k_train", tmp_path)


def test_a_folder_of_files_with_names_of_their_own(tmp_path: Path) -> None:
    for file in ("a", "b"):
        parquet(tmp_path / f"{file}.parquet", [{"question": file, "answer": "#### 1"}])
    assert [row["prompt"][0]["content"][0] for row in load("gsm8k", tmp_path)] == ["a", "b"]


def test_repeated_problems_are_counted(tmp_path: Path) -> None:
    rows = [dapo("A?", "1"), dapo("B?", "2"), dapo("A?", "1"), dapo("A?", "7"), dapo("C?", "3")]
    loaded = load_counted("dapo_math_17k", parquet(tmp_path / "rows.parquet", rows))
    assert [row["reward_model"]["ground_truth"] for row in loaded.rows] == ["1", "2", "3"]
    assert [row["extra_info"]["index"] for row in loaded.rows] == [0, 1, 4]
    assert (loaded.repetitions, loaded.contradictions) == (2, 1)


def test_benchmarks_stay_as_they_were_published(tmp_path: Path) -> None:
    loaded = load_counted("math500", parquet(tmp_path / "rows.parquet", [MATH500[0]] * 2))
    assert (len(loaded.rows), loaded.repetitions) == (2, 0)


# --------------------------------------------------------------------------------------------- one-sentence refusals


def refused(name: str, source: Path | None = None) -> str:
    with pytest.raises(SystemExit) as caught:
        load(name, source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_name_lists_the_known() -> None:
    message = refused("math5000")
    assert message.startswith("math5000: ")
    assert all(name in message for name in DATASETS)


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it\nat all"), ValueError(""), OSError("offline")])
def test_without_the_hub_it_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refused("math500")
    assert "HuggingFaceH4/MATH-500" in message
    assert message.endswith("then python -m examples.data.prepare math500 --from FILE.")


def test_a_missing_column_is_named_and_so_are_the_others(tmp_path: Path) -> None:
    message = refused("math500", parquet(tmp_path / "rows.parquet", ROWS["amc23"]))
    assert message == "math500: column 'problem' is missing; there are id, question, answer, url."


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("math500", {"problem": "?", "answer": ""}),
        ("math500", {"problem": "?", "answer": None}),
        ("amc23", {"question": None, "answer": "1"}),
        ("gsm8k", {"question": "?", "answer": "It is 5."}),
        ("math", {"problem": "?", "solution": "It is 5."}),
        ("math", {"problem": "?", "solution": r"It is \boxed{5."}),
        ("olympiadbench", {"question": "?", "final_answer": []}),
        ("olympiadbench", {"question": "?", "final_answer": None}),
        ("dapo_math_17k", {**dapo("?", "1"), "reward_model": {"style": "rule"}}),
        ("dapo_math_17k", {**dapo("?", "1"), "prompt": []}),
    ],
)
def test_a_row_without_problem_or_answer_is_named(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [ROWS[name][0], row]))
    assert f"{name}, row 1: no " in refused(name, path)


@pytest.mark.parametrize("text", ["Find $c$.", f"{DAPO_BEFORE}\n\nFind $c$.", f"Find $c$.\n\n{DAPO_AFTER}"])
def test_prompts_with_other_instructions_are_refused(text: str, tmp_path: Path) -> None:
    row = {**dapo("?", "1"), "prompt": [{"role": "user", "content": text}]}
    message = refused("dapo_math_17k", parquet(tmp_path / "rows.parquet", [row]))
    assert "not wrapped in the instructions" in message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refused("math500", tmp_path / "none.parquet")
    assert "no parquet files" in refused("math500", tmp_path)
    for file in ("rows.parquet", "rows.jsonl", "rows.json"):
        (tmp_path / file).write_text("neither")
        assert "cannot be read (" in refused("math500", tmp_path / file)
    (tmp_path / "rows.txt").write_text("text")
    assert "give a .parquet" in refused("math500", tmp_path / "rows.txt")


@pytest.mark.parametrize("name", ["math500", "dapo_math_17k"])
def test_empty_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    assert refused(name, path) == f"{name}: no rows in {path}."
