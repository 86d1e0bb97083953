"""`soup-verl plot` and `soup-verl show`: what they find, what they draw and print, what they refuse."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import recipe.soup.tools.show as showing
from recipe.soup.tools import cli, plot

METRICS = {
    "val-core/countdown/acc/mean@16": 0.25,
    "val-aux/countdown/acc/best@16/mean": 0.9,
    "soup/val/countdown/pass@16": 0.75,
    "soup/val/entropy": 0.3,
    "actor/entropy": 0.2,
    "soup/train/reward/mixed": 0.1,
    "soup/train/reward/mixed_minus_pure": -0.1,
    "soup/train/prefix/ratio_at_start/max": 2.0,
    "soup/train/prefix/lag/mean": 4.0,
}


def soup(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["soup", *map(str, argv)])
    cli.main()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two steps and its samples, the second of which is never mixed."""
    lines = [{"step": step, "data": METRICS} for step in (0, 1, 2)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "one/samples").mkdir(parents=True)
    for step in (2, 10):
        samples = [
            {"step": step, "input": "3 5=8:", "marked": "⟦3+\n5⟧=8", "score": 1.0, "policy_versions": [1, 1, 4]},
            {"step": step, "input": "3 5=8:", "marked": "5+[3]=8", "score": 0.0, "policy_versions": [4, 4, 4]},
        ]
        rows = [{**sample, "prefix_length": sample["marked"].count("⟦")} for sample in samples]
        path = tmp_path / f"one/samples/{step}.jsonl"
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return tmp_path / "one"


@pytest.mark.parametrize("named", ["one", "one.jsonl"])
def test_each_curve_once(run: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[str]] = {}
    close = plt.close

    def keep(figure: Figure) -> None:
        drawn.update({axis.get_title(): [str(line.get_label()) for line in axis.lines] for axis in figure.axes})
        close(figure)

    monkeypatch.setattr(plot.plt, "close", keep)
    soup(monkeypatch, "plot", run.parent / named)
    assert (run.parent / "one.png").stat().st_size > 10000
    assert drawn["accuracy (unmixed validation)"] == ["mean"]
    assert drawn["pass@16 (unmixed validation)"] == ["pass@16"]
    assert drawn["entropy, nats a token"] == ["validation", "training"]
    assert drawn["reward in training"] == ["with a prefix"]
    assert drawn["groups with signal"] == []
    assert drawn["lag, updates"] == ["mean"]


@pytest.mark.parametrize("largest", [1.1, 3.0, 49.0])
def test_numbers_at_the_axes_are_no_formulas(largest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = {f"soup/train/prefix/ratio_at_start/{name}": value for name, value in (("max", largest), ("min", 0.9))}
    lines = [json.dumps({"step": step, "data": {**METRICS, **ratios}}) for step in (1, 2)]
    (tmp_path / "one.jsonl").write_text("\n".join(lines) + "\n")
    numbers: list[str] = []
    close = plt.close

    def keep(figure: Figure) -> None:
        for axis in figure.axes:
            for side in (axis.xaxis, axis.yaxis):
                shown = [label.get_text() for label in side.get_ticklabels(which="both")]
                assert any(shown)
                numbers.extend(shown)
        close(figure)

    monkeypatch.setattr(plot.plt, "close", keep)
    soup(monkeypatch, "plot", tmp_path / "one.jsonl")
    assert numbers
    assert not [text for text in numbers if "$" in text or "\\" in text]


def test_zeros_of_steps_without_a_prefix_are_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {step: {**METRICS, "soup/train/prefix/tokens": float(step == 2)} for step in (1, 2)}
    lines = [json.dumps({"step": step, "data": metrics}) for step, metrics in steps.items()]
    (tmp_path / "one.jsonl").write_text("\n".join(lines) + "\n")
    drawn: dict[str, list[float]] = {}
    close = plt.close

    def keep(figure: Figure) -> None:
        drawn.update(
            {
                str(line.get_label()): np.asarray(line.get_xdata()).tolist()
                for axis in figure.axes
                for line in axis.lines
            }
        )
        close(figure)

    monkeypatch.setattr(plot.plt, "close", keep)
    soup(monkeypatch, "plot", tmp_path / "one.jsonl")
    assert drawn["with a prefix"] == drawn["largest"] == [2]
    assert drawn["training"] == [1, 2]


def test_data_sources_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {f"val-core/{name}/acc/mean@4": 0.5 for name in ("math500", "openai/gsm8k")}
    sources |= {f"soup/val/{name}/pass@4": 0.7 for name in ("math500", "openai/gsm8k")}
    (tmp_path / "one.jsonl").write_text(json.dumps({"step": 0, "data": sources}) + "\n")
    labels: list[str] = []
    close = plt.close

    def keep(figure: Figure) -> None:
        labels.extend(str(line.get_label()) for axis in figure.axes for line in axis.lines)
        close(figure)

    monkeypatch.setattr(plot.plt, "close", keep)
    soup(monkeypatch, "plot", tmp_path / "one.jsonl")
    expected = ["mean (math500)", "mean (openai/gsm8k)", "pass@4 (math500)", "pass@4 (openai/gsm8k)"]
    assert labels == expected


def test_history_is_coloured_and_the_newest_comes_first(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # Not by FORCE_COLOR: where `datasets` has replaced `os.environ` (its map does), rich still reads the old one.
    console = partial(Console, force_terminal=True, color_system="standard", no_color=False)
    monkeypatch.setattr(showing, "Console", console)
    soup(monkeypatch, "show", run)
    out = capsys.readouterr().out
    assert out.index("step 10") < out.index("step 2 ")
    assert out.count("versions 1, 4") == 2
    assert "\x1b[30;43m3+" in out  # black on yellow
    assert "⟦" not in out
    assert "5+[3]=8" not in out
    soup(monkeypatch, "show", run / "samples", "--step", "2", "--all")
    out = capsys.readouterr().out
    assert "5+[3]=8" in out  # brackets are text, not markup
    assert "step 10" not in out
    soup(monkeypatch, "show", run, "--count", "1")
    assert "step 2 " not in capsys.readouterr().out


def test_what_an_earlier_run_left_comes_last(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    os.utime(run / "samples/10.jsonl", (1, 1))
    soup(monkeypatch, "show", run)
    out = capsys.readouterr().out
    assert out.index("step 2 ") < out.index("step 10")


def test_brackets_where_there_are_no_colours(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(showing, "Console", partial(Console, color_system=None))
    soup(monkeypatch, "show", run)
    assert "3 5=8:⟦3+\n5⟧=8" in capsys.readouterr().out


@pytest.fixture
def tools(run: Path) -> Path:
    """A sample of three turns, with a tool's answer behind each of the first two."""
    sample = {
        "step": 11,
        "input": "3 5 7=22:",
        "marked": "⟦3*⟧5=⟪15⟫,15+7=⟪22⟫ yes",
        "score": 1.0,
        "policy_versions": [1] * 2 + [4] * 2 + [-2] * 2 + [4] * 6 + [-2] * 2 + [4],
        "response_mask": [1] * 4 + [0] * 2 + [1] * 6 + [0] * 2 + [1],
        "prefix_length": 2,
    }
    (run / "samples/11.jsonl").write_text(json.dumps(sample, ensure_ascii=False))
    return run


def test_turns_and_tools_have_colours_of_their_own(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        showing, "Console", partial(Console, force_terminal=True, color_system="standard", no_color=False)
    )
    soup(monkeypatch, "show", tools, "--step", "11")
    out = capsys.readouterr().out
    assert "versions 1, 4  turns 3" in out
    history, tool, second = "\x1b[30;43m", "\x1b[30;46m", "\x1b[1;35m"
    plain = f"{history}3*\x1b[0m5={tool}15\x1b[0m{second},15+7=\x1b[0m{tool}22\x1b[0m yes"
    assert plain in out
    assert "⟪" not in out


@pytest.fixture
def demonstrations(run: Path) -> Path:
    """A sample that begins with a demonstration, and one that is all of it."""
    begun = {
        "step": 12,
        "input": "3 5 7=22:",
        "marked": "⦅3*5⦆=15,15+7=22",
        "score": 1.0,
        "policy_versions": [-2] * 3 + [4] * 5,
        "response_mask": [0] * 3 + [1] * 5,
        "prefix_length": 0,
        "demonstration_length": 3,
    }
    whole = {"marked": "⦅3*5=15,15+7=22⦆", "policy_versions": [-2] * 8, "response_mask": [0] * 8}
    lines = [json.dumps(sample, ensure_ascii=False) for sample in (begun, begun | whole)]
    (run / "samples/12.jsonl").write_text("\n".join(lines))
    return run


def test_demonstrations_have_a_colour_of_their_own(
    demonstrations: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    coloured = partial(Console, force_terminal=True, color_system="standard", no_color=False)
    monkeypatch.setattr(showing, "Console", coloured)
    soup(monkeypatch, "show", demonstrations, "--step", "12")
    out = capsys.readouterr().out
    assert "\x1b[30;42m3*5\x1b[0m=15,15+7=22" in out
    assert "\x1b[30;42m3*5=15,15+7=22\x1b[0m" in out
    assert "⦅" not in out
    assert "versions 4\x1b" in out
    assert "a demonstration\x1b" in out


def test_demonstrations_have_brackets_where_there_are_no_colours(
    demonstrations: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(showing, "Console", partial(Console, color_system=None))
    soup(monkeypatch, "show", demonstrations, "--step", "12")
    out = capsys.readouterr().out
    assert out.startswith("⟦history⟧ the present ⟪tools⟫ ⦅demonstrations⦆")
    assert "3 5 7=22:⦅3*5⦆=15,15+7=22" in out


def test_brackets_around_what_tools_wrote_where_there_are_no_colours(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(showing, "Console", partial(Console, color_system=None))
    soup(monkeypatch, "show", tools, "--step", "11")
    assert "3 5 7=22:⟦3*⟧5=⟪15⟫,15+7=⟪22⟫ yes" in capsys.readouterr().out


def test_a_picture_has_brackets_colours_and_nothing_to_fetch(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    soup(monkeypatch, "show", run, "--svg", tmp_path / "pictures/samples.svg")
    assert capsys.readouterr().out == f"{tmp_path}/pictures/samples.svg\n"
    svg = (tmp_path / "pictures/samples.svg").read_text()
    assert "⟦3+" in svg
    assert 'fill="#d0b344"' in svg  # rich's yellow, behind history
    assert "url(http" not in svg


def test_of_a_chat_only_the_question_where_it_is_to_be_brief(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    chat = "system\nYou are a helpful assistant.\nuser\nHi.\nassistant\nHello.\nuser\nWhat is 3 + 5?\nassistant\n"
    path = run / "samples/10.jsonl"
    rows = [{**json.loads(line), "input": chat} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(showing, "Console", partial(Console, color_system=None))
    soup(monkeypatch, "show", run, "--step", "10", "--brief")
    out = capsys.readouterr().out
    assert "\nWhat is 3 + 5?\n⟦3+" in out
    assert "Hello" not in out
    soup(monkeypatch, "show", run, "--step", "2", "--brief")
    assert "3 5=8:⟦3+\n5⟧=8" in capsys.readouterr().out  # no chat


def test_only_what_matches(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(showing, "Console", partial(Console, color_system=None))
    soup(monkeypatch, "show", run, "--match", r"⟧=\d$")
    assert "⟦3+\n5⟧=8" in capsys.readouterr().out
    soup(monkeypatch, "show", run, "--match", r"⟧=\d\d")
    assert "No sample here has a prefix and ⟧=" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--match=\\[: no regular expression"):
        soup(monkeypatch, "show", run, "--match", "[")


def test_no_prefixes_are_said_to_be_none(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for dump in (run / "samples").glob("*.jsonl"):
        rows = [{**json.loads(line), "prefix_length": 0} for line in dump.read_text().splitlines()]
        dump.write_text("".join(json.dumps(row) + "\n" for row in rows))
    soup(monkeypatch, "show", run)
    assert "No sample here has a prefix; --all shows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plot", "nowhere"], "run=nowhere: no metrics there"),
        (["show", "nowhere"], "run=nowhere: no samples there"),
        (["compare"], "give a study, or --from-logs"),
    ],
)
def test_refusals(argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=message):
        soup(monkeypatch, *argv)
