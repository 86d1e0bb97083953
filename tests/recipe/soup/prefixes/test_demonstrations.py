"""From cells of a data set to tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from recipe.soup.prefixes.demonstrations import Demonstrations, as_prefix, cell, texts_in
from recipe.soup.settings import DemonstrationSettings

LUFFY = [{"role": "assistant", "content": "3+4=7"}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("3+4=7", ["3+4=7"]),
        (LUFFY, ["3+4=7"]),
        (LUFFY[0], ["3+4=7"]),
        ([LUFFY, [{"role": "assistant", "content": "4+3=7"}]], ["3+4=7", "4+3=7"]),
        (["3+4=7", "", None, "4+3=7"], ["3+4=7", "4+3=7"]),
        (np.array(LUFFY, dtype=object), ["3+4=7"]),
        ([{"role": "user", "content": "no"}, {"content": "yes"}], ["yes"]),
        *((nothing, []) for nothing in (None, "", [], float("nan"), {}, {"role": "assistant", "content": None})),
    ],
)
def test_what_a_column_may_hold(value: Any, expected: list[str]) -> None:
    assert texts_in(value) == expected


@pytest.mark.parametrize("value", [3, 1.5, [3], {"content": 7}, True])
def test_what_it_may_not(value: Any) -> None:
    with pytest.raises(TypeError, match="a demonstration is a text, a message or a list of them"):
        texts_in(value)


def test_steps_are_one_demonstration() -> None:
    assert texts_in(["3+4=7", ",7+5=12"], in_steps=True) == ["3+4=7,7+5=12"]
    assert texts_in([], in_steps=True) == []


def test_a_column_may_be_a_field() -> None:
    row = {"reward_model": {"candidates": ["a"]}, "target": "b"}
    assert cell(row, "reward_model.candidates") == ["a"]
    assert cell(row, "target") == "b"
    assert cell(row, "reward_model.other") is cell(row, "target.other") is cell(row, "other") is None


def test_tokens_are_those_of_the_text_and_one_end(countdown_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(countdown_dir / "base_model")
    texts = ["3+4=7", f"3+4=7{tokenizer.eos_token}"]
    read = Demonstrations(DemonstrationSettings(), tokenizer, lambda batch: batch)
    [[one, other], nothing] = read([{"target": texts}, {}])
    assert one.tolist() == other.tolist() == [*tokenizer.encode("3+4=7", add_special_tokens=False), 1]
    assert tokenizer.decode(one, skip_special_tokens=True) == "3+4=7"
    assert nothing == []


def test_a_file_of_verls_dataset(countdown_dir: Path, tmp_path: Path) -> None:
    """What pandas makes of a parquet column: arrays of mappings, and None."""
    pd.DataFrame({"target": [LUFFY, None]}).to_parquet(tmp_path / "rows.parquet")
    rows = pd.read_parquet(tmp_path / "rows.parquet").to_dict("records")
    assert [texts_in(row["target"]) for row in rows] == [["3+4=7"], []]


def test_no_policy_is_known_for_a_prefix() -> None:
    ids = np.array([4, 5, 6, 1], dtype=np.int32)
    part, whole, cut = as_prefix(ids, 2, "keep"), as_prefix(ids, 4, "keep"), as_prefix(ids, 9, "cut")
    assert (part.token_ids.tolist(), part.versions, part.complete) == ([4, 5], [-2, -2], False)
    assert (whole.token_ids.tolist(), whole.complete) == ([4, 5, 6, 1], True)
    assert (cut.token_ids.tolist(), cut.complete) == ([4, 5, 6], False)
