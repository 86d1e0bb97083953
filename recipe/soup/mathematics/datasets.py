"""Load datasets for training and evaluation, from the Hugging Face hub or a file, as rows in verl's columns.

The columns that are read are those of the hub's repositories; each was looked up in code that uses it, e.g. verl's
`examples/data_preprocess`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from recipe.soup.errors import first_line
from recipe.soup.mathematics.boxed import last_box

Row = dict[str, Any]

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The instruction of Qwen2.5-Math, appended to every problem, so that training and evaluation ask alike."""

DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem."
)
DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'

DOLLAR = re.compile(r"(?<!\\)\$")
SPLITS = ("train", "test", "validation")


@dataclass(frozen=True)
class Dataset:
    """Where a dataset is on the hub, and how a problem and its answer are read from one of its rows.

    Attributes:
        repository, config, split: its names on the hub.
        columns: the columns that `problem` and `answer` need.
        problem: reads the bare text, without an instruction; "" if the row has none.
        answer: reads the true answer; "" if the row has none.
        repeated: whether a problem may be there many times; only the first is used.
    """

    repository: str
    split: str
    columns: tuple[str, ...]
    problem: Callable[[Row], str]
    answer: Callable[[Row], str]
    config: str | None = None
    repeated: bool = False


def _text(value: Any) -> str:
    """Return the text of a cell; "" for an empty one."""
    if isinstance(value, float):
        return "" if value != value else str(int(value)) if value.is_integer() else str(value)
    return "" if value is None else str(value).strip()


def _latex(value: Any) -> str:
    """Return the text of a cell without dollar signs."""
    return DOLLAR.sub("", _text(value)).strip()


def _plain(repository: str, split: str, problem: str, answer: str) -> Dataset:
    """Describe a dataset whose problems and answers are columns of text."""
    return Dataset(
        repository, split, (problem, answer), lambda row: _text(row[problem]), lambda row: _latex(row[answer])
    )


def _gsm8k(split: str) -> Dataset:
    """Describe GSM8K, whose solutions end with `#### 1,080`."""

    def answer(row: Row) -> str:
        _, hashes, number = row["answer"].rpartition("####")
        return number.strip().replace(",", "") if hashes else ""

    return Dataset(
        "openai/gsm8k", split, ("question", "answer"), lambda row: _text(row["question"]), answer, config="main"
    )


def _olympiad_problem(row: Row) -> str:
    """Read a problem; a few refer to a context that is in a column of its own."""
    return "\n".join(_text(text) for text in (row.get("context"), row["question"]) if text)


def _olympiad_answer(row: Row) -> str:
    """Read the answers, joined by commas.

    A problem with several (`is_multiple_answer`) mostly has them in one text, with commas, and seldom in several texts.
    The column `unit` is left out, since the grader ignores units, and so is `error`, a tolerance for physics.
    """
    answers = row["final_answer"]
    return ", ".join(map(_latex, [answers] if isinstance(answers, str) else answers))


def _dapo_problem(row: Row) -> str:
    text = row["prompt"][-1]["content"].strip()
    if not (text.startswith(DAPO_BEFORE) and text.endswith(DAPO_AFTER)):
        raise SystemExit(
            f"dapo_math_17k: a prompt is not wrapped in the instructions that we replace by our own; it begins "
            f"{text[:60]!r} and ends {text[-60:]!r}: give the hub's file, {DATASETS['dapo_math_17k'].repository}."
        )
    return text.removeprefix(DAPO_BEFORE).removesuffix(DAPO_AFTER).strip()


DATASETS = {
    # For evaluation.
    "math500": _plain("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "amc23": _plain("math-ai/amc23", "test", "question", "answer"),
    "minerva": _plain("math-ai/minervamath", "test", "question", "answer"),
    "olympiadbench": Dataset(
        repository="Hothan/OlympiadBench",
        config="OE_TO_maths_en_COMP",
        split="train",
        columns=("question", "final_answer"),
        problem=_olympiad_problem,
        answer=_olympiad_answer,
    ),
    "gsm8k": _gsm8k("test"),
    # For training.
    "dapo_math_17k": Dataset(
        repository="BytedTsinghua-SIA/DAPO-Math-17k",
        split="train",
        columns=("prompt", "reward_model"),
        problem=_dapo_problem,
        answer=lambda row: _text(row["reward_model"]["ground_truth"]),
        repeated=True,  # each of its 17,000 problems is there about a hundred times, by accident (DAPO's issue 36)
    ),
    "math": Dataset(
        repository="DigitalLearningGmbH/MATH-lighteval",
        split="train",
        columns=("problem", "solution"),
        problem=lambda row: _text(row["problem"]),
        answer=lambda row: last_box(row["solution"]) or "",
    ),
    "gsm8k_train": _gsm8k("train"),
}


class Loaded(NamedTuple):
    """Rows in verl's columns, and counts of those that were left out.

    Attributes:
        repetitions: number of rows whose problem had come before.
        contradictions: number of these whose answer was another one.
    """

    rows: list[Row]
    repetitions: int
    contradictions: int


def load(name: str, source: Path | None = None) -> list[Row]:
    """Load a dataset's rows in verl's columns.

    Args:
        name: one of `DATASETS`.
        source: a file with the hub's columns (parquet, json, jsonl, csv) or a folder of parquet files; None: the hub.

    Returns:
        `data_source` (the name), `prompt` (one user message: the problem and `INSTRUCTION`), `ability`, `reward_model`
        (`style`, `ground_truth`) and `extra_info` (`split`, and `index`, the row's number in the source, from 0).

    Raises:
        SystemExit: the name is unknown, the hub is out of reach, a file cannot be read, a column or all rows are
            missing, or a row has no problem or no answer.
    """
    return load_counted(name, source).rows


def load_counted(name: str, source: Path | None = None) -> Loaded:
    """Load as `load` does, and count what is left out."""
    rows = _verl_rows(name, source)
    loaded = _first_of_each(rows) if DATASETS[check_name(name)].repeated else Loaded(list(rows), 0, 0)
    if not loaded.rows:
        raise SystemExit(f"{name}: no rows in {source or DATASETS[name].repository}.")
    return loaded


def check_name(name: str) -> str:
    """Return the name itself.

    Raises:
        SystemExit: it is not one of `DATASETS`.
    """
    if name not in DATASETS:
        raise SystemExit(f"{name}: no such dataset; there are {', '.join(DATASETS)}.")
    return name


def _first_of_each(rows: Iterable[Row]) -> Loaded:
    """Keep the first row of each problem."""
    first: dict[str, Row] = {}
    repetitions = contradictions = 0
    for row in rows:
        known = first.setdefault(row["prompt"][0]["content"], row)
        if known is not row:
            repetitions += 1
            contradictions += known["reward_model"] != row["reward_model"]
    return Loaded(list(first.values()), repetitions, contradictions)


def _verl_rows(name: str, source: Path | None) -> Iterator[Row]:
    dataset = DATASETS[check_name(name)]
    total, rows = _from_hub(name) if source is None else _from_files(name, source)
    # DAPO's 1.8 million rows take long enough to be watched; the display appears after two seconds.
    for index, row in enumerate(tqdm(rows, desc=name, unit=" rows", total=total, delay=2)):
        if missing := [column for column in dataset.columns if column not in row]:
            raise SystemExit(f"{name}: column {missing[0]!r} is missing; there are {', '.join(map(str, row))}.")
        texts = {}
        for what, read in (("problem", dataset.problem), ("answer", dataset.answer)):
            try:
                texts[what] = read(row)
            except (AttributeError, IndexError, KeyError, TypeError):
                texts[what] = ""
            if not texts[what]:
                values = {column: str(row[column])[:80] for column in dataset.columns}
                raise SystemExit(f"{name}, row {index}: no {what} found in {values}.")
        yield {
            "data_source": name,
            "prompt": [{"role": "user", "content": texts["problem"] + INSTRUCTION}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": texts["answer"]},
            "extra_info": {"split": dataset.split, "index": index},
        }


def _from_hub(name: str) -> tuple[int, Iterable[Row]]:
    from datasets import load_dataset  # takes seconds, and files do without it

    dataset = DATASETS[name]
    try:
        rows: Any = load_dataset(dataset.repository, dataset.config, split=dataset.split)
    except Exception as error:  # the hub's client has a dozen kinds of its own
        raise SystemExit(
            f"{name}: {dataset.repository} could not be loaded from the Hugging Face hub ({first_line(error)}): "
            f"download it where there is network, then python -m examples.data.prepare {name} --from FILE."
        ) from error
    return len(rows), rows


def _from_files(name: str, source: Path) -> tuple[int | None, Iterable[Row]]:
    if not source.exists():
        raise SystemExit(f"{name}: {source}: no such file or folder.")
    files = _parquet_files(name, source) if source.is_dir() else [source]
    try:
        if all(file.suffix == ".parquet" for file in files):
            from pyarrow.parquet import ParquetFile

            opened = [ParquetFile(file) for file in files]
            total = sum(file.metadata.num_rows for file in opened)
            # Small batches: all of DAPO's rows as Python objects would take gigabytes.
            return total, (row for file in opened for batch in file.iter_batches(4096) for row in batch.to_pylist())
        if source.suffix == ".csv":
            rows: Any = pd.read_csv(source, dtype=str, keep_default_na=False).to_dict("records")
        elif source.suffix in (".json", ".jsonl"):
            # The hub's client also writes lines into files called .json.
            # Unlike a run's log, a dataset must be whole.
            text = source.read_text(encoding="utf-8-sig")
            is_list = text[:100].lstrip().startswith("[")
            rows = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            raise SystemExit(f"{name}: {source}: give a .parquet, .json, .jsonl or .csv file, or a folder of parquet.")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{name}: {source} cannot be read ({first_line(error)}).") from error
    return len(rows), rows


def _parquet_files(name: str, folder: Path) -> list[Path]:
    """Return a folder's parquet files; if names begin with a split's name, as on the hub, only those of our split."""
    split = DATASETS[name].split
    files = sorted(folder.glob("*.parquet"))
    if any(file.name.startswith(SPLITS) for file in files):
        files = [file for file in files if file.name.startswith(split)]
    if not files:
        raise SystemExit(f"{name}: {folder}: no parquet files of the split {split!r} there.")
    return files
