"""Every tool on odd files, folders and terminals: a result or a sentence, never a traceback."""

import json
import subprocess
import sys
from errno import ENOSPC
from pathlib import Path

import pytest
from refusals import sentence

from recipe.soup.tools import verify
from recipe.soup.tools.cli import main

ROOT = Path(__file__).resolve().parents[4]
GOOD = "".join(
    json.dumps({"step": step, "data": {"critic/score/mean": 0.5, "timing_s/step": 3.0, "val-core/x/acc/mean@8": 0.2}})
    + "\n"
    for step in (0, 1)
)
SAMPLE = {
    "step": 2,
    "input": "q",
    "marked": "⟦a⟧b",
    "score": 1.0,
    "policy_versions": [0, 0],
    "prefix_length": 1,
    "prompt_ids": [2, 3],
    "response_ids": [4, 5],
    "old_log_probs": [-1.0, -1.0],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "folder").mkdir()
    return tmp_path


def refusal(*arguments: str) -> str:
    return sentence(main, arguments)


def dump(here: Path, **fields: object) -> None:
    (here / "run/samples").mkdir(parents=True, exist_ok=True)
    (here / "run/samples/2.jsonl").write_text(json.dumps({**SAMPLE, **fields}) + "\n")


BROKEN = GOOD.splitlines()[0] + "\n" + GOOD[:20] + "\n" + GOOD


@pytest.mark.parametrize("tool", ["summary", "plot", "compare"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (BROKEN.encode(), "file=odd.jsonl: line 2 is no JSON"),
        (GOOD.encode("utf-16"), "file=odd.jsonl: line 1 is no UTF-8"),
        (b'{"step": 1, "reward": 1}\n', "file=odd.jsonl: line 1 has no `data`"),
        (None, "run=odd.jsonl: no metrics there"),
    ],
)
def test_logs_that_cannot_be_read(tool: str, content: bytes | None, says: str, here: Path) -> None:
    if content is None:
        (here / "odd.jsonl").mkdir()
    else:
        (here / "odd.jsonl").write_bytes(content)
    given = ["--from-logs", "good.jsonl", "odd.jsonl"] if tool == "compare" else ["odd.jsonl"]
    assert refusal(tool, *given).startswith(says)


@pytest.mark.parametrize("tool", ["summary", "plot"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + GOOD.encode()),
        ("empty.jsonl", b""),
        ("it's.jsonl", GOOD.encode()),
        ("of $x$ and $\\nonsense.jsonl", GOOD.encode()),  # no formula
        ("text.jsonl", b'{"step": 1, "data": {"critic/score/mean": [1], "timing_s/step": "x"}}\n'),
    ],
)
def test_logs_that_can_be_read(tool: str, name: str, content: bytes, here: Path) -> None:
    (here / name).write_bytes(content)
    main([tool, name])


def test_runs_that_measured_nothing_are_compared(here: Path) -> None:
    (here / "empty.jsonl").touch()
    main(["compare", "--from-logs", "empty.jsonl", "--out", "out"])
    assert "| empty | 1 | 0 |" in (here / "out/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plot", "good.jsonl", "--out", "folder"], "--out=folder: is a folder"),
        (["plot", "good.jsonl", "--out", "good.jsonl/x.png"], "--out=good.jsonl: nothing can be written there"),
        (["plot", "good.jsonl", "--out", "x.nosuch"], "--out=x.nosuch: no picture ends so; choose among"),
        (["show", "run", "--svg", "folder"], "--svg=folder: is a folder"),
        (["show", "run", "--svg", "good.jsonl/x.svg"], "--svg=good.jsonl: nothing can be written there"),
        (["show", "run", "--count", "0"], "--count=0: give 1 or more"),
        (["compare", "--from-logs", "good.jsonl", "--out", "good.jsonl"], "--out=good.jsonl: nothing can be written"),
        (["compare", "--from-logs", "=good.jsonl"], "--from-logs==good.jsonl: there is no name before the ="),
        (["compare", "folder"], "study=folder: cannot be read"),
        (["compare", "good.jsonl"], "study=good.jsonl: "),
        (
            ["verify", "--samples", "run/samples", "--checkpoints", "x", "--base-model", "x", "--temperature", "0"],
            "--temp",
        ),
    ],
)
def test_places_that_cannot_be_used(arguments: list[str], says: str, here: Path) -> None:
    dump(here)
    assert refusal(*arguments).startswith(says)


def test_a_picture_goes_to_a_folder_that_is_not_there_yet(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plot", "good.jsonl", "--out", "a/b/c.png"])
    assert capsys.readouterr().out == "a/b/c.png\n"
    assert (here / "a/b/c.png").exists()


@pytest.mark.filterwarnings("error:No artists")
def test_a_run_may_be_named_by_its_folder_in_a_comparison(here: Path) -> None:
    (here / "good").mkdir()
    main(["compare", "--from-logs", "good", "it=good.jsonl", "--out", "out"])
    assert "| it | 1 |" in (here / "out/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"marked": 3}, "`marked` in line 1 is '3', not text"),
        ({"score": None}, "`score` in line 1 is 'None', not a number"),
        ({"policy_versions": 1}, "`policy_versions` in line 1 is '1', not a list"),
        ({"response_mask": [1]}, "`response_mask` has not one value for each token"),
        ({"response_mask": 1}, "`response_mask` has not one value for each token"),
    ],
)
def test_samples_that_cannot_be_shown(fields: dict[str, object], says: str, here: Path) -> None:
    dump(here, **fields)
    assert says in refusal("show", "run")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"old_log_probs": [-1.0]}, "sample 1 has not one number for each token"),
        ({"policy_versions": ["a", "b"]}, "sample 1 has not one number for each token"),
        ({"response_ids": [None, 3]}, "sample 1 has not one number for each token"),
        ({"response_ids": [1.5, 3]}, "sample 1 has not one number for each token"),
        ({"prompt_ids": "x"}, "`prompt_ids` in line 1 is 'x', not a list"),
        ({"prompt_ids": [10**6]}, "has 19 tokens, and the samples have number 1000000"),
    ],
)
def test_samples_that_cannot_be_verified(fields: dict[str, object], says: str, here: Path, countdown_dir: Path) -> None:
    dump(here, **fields)
    where = ["--samples", "run/samples", "--checkpoints", "folder"]
    assert says in refusal("verify", *where, "--base-model", f"{countdown_dir}/base_model")


def test_a_full_disk_is_a_sentence(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(ENOSPC, "No space left on device")

    dump(here)
    full.__module__ = "recipe.soup.tools.show"
    monkeypatch.setattr("recipe.soup.tools.show.show", full)
    assert refusal("show", "run") == "file=?: No space left on device."


def test_an_empty_dump_proves_nothing(here: Path, countdown_dir: Path) -> None:
    dump(here)
    (here / "run/samples/2.jsonl").write_text("")
    (here / "folder/global_step_last/actor/huggingface").mkdir(parents=True)
    where = ["--samples", "run/samples", "--checkpoints", "folder", "--expect", "prefix"]
    assert "nothing is proved" in refusal("verify", *where, "--base-model", f"{countdown_dir}/base_model")


@pytest.mark.parametrize("model", ["folder", "good.jsonl"])
def test_what_is_no_model(model: str, here: Path) -> None:
    dump(here)
    said = refusal("verify", "--samples", "run/samples", "--checkpoints", "folder", "--base-model", model)
    assert said.startswith(f"model={model}: cannot be loaded by transformers")


def test_code_that_comes_with_a_model_is_not_run(here: Path) -> None:
    settings = {"model_type": "theirs", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (here / "folder/config.json").write_text(json.dumps(settings))
    (here / "folder/code.py").write_text("open('ran', 'w')\n")
    with pytest.raises(SystemExit, match="model=folder: cannot be loaded"):
        verify.load(Path("folder"), "cpu", "folder")
    assert not (here / "ran").exists()


def test_samples_drive_no_terminal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump(here, marked="⟦\x1b]0;title\x07⟧\x9b2J", input="\x1b[31m")
    main(["show", "run", "--svg", "picture.svg"])
    main(["show", "run"])
    said = capsys.readouterr().out + (here / "picture.svg").read_text(encoding="utf-8")
    assert not {"\x1b", "\x07", "\x9b"} & set(said)
    assert r"\x1b]0;title\x07" in said


@pytest.fixture
def ascii_terminal(clean_environ: dict[str, str]) -> dict[str, str]:
    plain = {key: value for key, value in clean_environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    return {**plain, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}


def test_a_terminal_that_has_ascii_only(here: Path, ascii_terminal: dict[str, str]) -> None:
    dump(here)
    calls = "from recipe.soup.tools.cli import main\n"
    calls += "for call in (['show', 'run'], ['show', 'run', '--svg', 'x.svg'], ['summary', 'good.jsonl']): main(call)"
    told = subprocess.run(
        [sys.executable, "-c", calls], env=ascii_terminal, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert r"\u27e6a\u27e7b" in told.stdout
    assert (here / "x.svg").exists()


def test_a_reader_that_has_seen_enough(here: Path) -> None:
    (here / "many").mkdir()
    line = json.dumps({**SAMPLE, "input": "q" * 2000}) + "\n"
    (here / "many/2.jsonl").write_text(line * 400)
    show = f"{sys.executable} -m recipe.soup.tools.cli show many --count 400"
    told = subprocess.run(["bash", "-c", f"{show} | head -1"], capture_output=True, text=True, check=False)
    assert told.stdout.startswith("⟦history⟧")
    assert told.stderr == ""
