"""Lines as kills, editors, full disks and other tools leave them: read, or refused in a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.soup.records.json_lines import dumps, read_json_lines
from recipe.soup.records.marks import printable
from recipe.soup.records.metrics_file import read_metrics

ONE, TWO = (json.dumps({"step": step, "data": {"é": 0.5}}, ensure_ascii=False).encode() for step in (1, 2))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "one.jsonl"


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (b"", []),
        (ONE + b"\n" + TWO + b"\n", [1, 2]),
        (b"\xef\xbb\xbf" + ONE + b"\n" + TWO, [1, 2]),  # a byte order mark
        (ONE + b"\r\n" + TWO + b"\r\n", [1, 2]),
        (b"\n \n" + ONE + b"\n\n" + TWO + b"\n\n", [1, 2]),
        (ONE + b"\n" + TWO[:-10], [1]),  # killed while it wrote
        (ONE + b"\n" + TWO[: TWO.index(b"\xc3") + 1], [1]),  # inside of a character
        (ONE + b'\n{"step": 2, "data": {"a": null, "b": "text", "c": [1], "d": NaN}}\n', [1, 2]),
    ],
)
def test_what_can_be_read(content: bytes, steps: list[int], file: Path) -> None:
    file.write_bytes(content)
    assert list(read_metrics(file)) == steps


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (ONE + b"\n" + TWO[:15] + ONE + b"\n", "line 2 is no JSON"),  # two wrote at once
        (ONE + b"\n" + TWO[:15] + b"\n" + TWO + b"\n", "line 2 is no JSON"),
        (ONE + b"\n" + bytes(30) + b"\n" + TWO, "line 2 is no JSON"),  # a machine that lost its power
        (b"[" * 100_000 + b"\n", "line 1 is no JSON"),
        (b"Epoch 1\nEpoch 2\n", "line 1 is no JSON"),
        (ONE.decode().encode("latin-1") + b"\n", "line 1 is no UTF-8"),
        ((ONE + b"\n" + TWO).decode().encode("utf-16"), "line 1 is no UTF-8"),
        (b"[1]\n", "line 1 is '[1]', and must be an object"),
        (b"3\n", "line 1 is '3', and must be an object"),
        (b'{"step": 1, "reward": 2}\n', "line 1 has no `data`, so this is not what verl's file logger wrote"),
        (ONE + b'\n{"data": {}}\n', "line 2 has no `step`"),
        (b'{"step": "1", "data": {}}\n', "`step` in line 1 is '1', not a whole number"),
        (b'{"step": 1, "data": [1]}\n', "`data` in line 1 is '[1]', not an object"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(content: bytes, says: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(SystemExit) as refusal:
        read_metrics(file)
    assert str(refusal.value).startswith(f"file={file}: {says}")
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.jsonl", tmp_path / "one" / "two.jsonl"):
        with pytest.raises(SystemExit, match="cannot be read"):
            read_json_lines(path)


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none())))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_json_lines(path) == rows


def test_the_files_of_a_dump(tmp_path: Path) -> None:
    for name in ("2.jsonl", "10.jsonl", "x.jsonl", "²2.jsonl", "-1.jsonl", "3.json"):
        (tmp_path / name).touch()
    assert set(dumps(tmp_path)) == {2, 10}
    assert dumps(tmp_path / "nowhere") == {}


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Z", "Cc", "Cs"])))
def test_printed_text_drives_no_terminal(text: str) -> None:
    shown = printable(text)
    assert all(character.isprintable() or character in "\n\t" or character.isspace() for character in shown)
    assert "\x1b" not in shown
    shown.encode()
    assert printable("plain ⟦text⟧\n\té") == "plain ⟦text⟧\n\té"
