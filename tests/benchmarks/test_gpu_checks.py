"""`benchmarks/gpu.sh all`: checks that succeed, fail, say nothing, or do not end, and what later calls take up."""

import contextlib
import json
import os
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu_checks
from benchmarks.gpu_checks import CHECKS, run_all
from benchmarks.gpu_results import Check, card, render
from benchmarks.windows import main, table

SCRIPT = """#!/usr/bin/env bash
echo "noise of $*"
echo "$1" >> {folder}/started
case $1 in
good*|cost) echo "== result"; printf '\\rLoading 10%%\\rLoading 100%%\\n' >&2; echo "| steps | reward |" ;;
fails) seq 200; [ -e {folder}/mended ] || exit 3; echo "== result"; echo mended ;;
silent) ;;
endless) sleep 600 & echo $! > {folder}/child; wait ;;
esac
"""
GOOD, FAILS, SILENT = Check(("good", "one"), 1, "a"), Check(("fails",), 1, "b"), Check(("silent",), 1, "c")
ENDLESS, LATER = Check(("endless",), 1, "d"), Check(("good-later",), 1, "e")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "script"
    path.write_text(SCRIPT.format(folder=tmp_path))
    path.chmod(0o755)
    monkeypatch.setattr(gpu_checks, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu_checks, "ENDING", 1.0)
    return path


def started(script: Path) -> list[str]:
    path = script.with_name("started")
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def test_it_goes_on_when_one_fails_and_takes_up_only_what_is_open(script: Path) -> None:
    results, checks = script.with_name("results"), [GOOD, FAILS, SILENT, LATER]
    run_all(checks, results, 60, script, ["x=1"])
    assert started(script) == ["good", "fails", "silent", "good-later"]
    result = json.loads((results / "good_one.json").read_text())
    assert result["command"] == "benchmarks/gpu.sh good one x=1"
    assert (result["figures"], result["card"]) == ("| steps | reward |", card())
    assert (results / "good_later.json").exists()
    failure = (results / "fails.failed.txt").read_text().splitlines()
    assert "exit code 3" in failure[0]
    assert failure[-1] == "200"
    assert len(failure) < 70
    assert "no figures" in (results / "silent.failed.txt").read_text()
    page = (results / "README.md").read_text()
    assert f"| good_one | a | {card()} |" in page
    assert "| fails | b | failed: [the end of its log](fails.failed.txt) |" in page

    script.with_name("mended").touch()
    run_all(checks, results, 60, script, [])
    assert started(script) == ["fails", "silent"]
    assert json.loads((results / "fails.json").read_text())["figures"] == "mended"
    assert not (results / "fails.failed.txt").exists()
    assert "```\nmended\n```" in (results / "README.md").read_text()


def test_one_that_runs_over_is_ended_with_all_its_processes(script: Path) -> None:
    results, began = script.with_name("results"), time.monotonic()
    run_all([ENDLESS, GOOD], results, 5, script, [])
    assert time.monotonic() - began < 6
    child = int(script.with_name("child").read_text())
    until = time.monotonic() + 10  # a busy machine takes a while to end what was killed
    while psutil.pid_exists(child) and time.monotonic() < until:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
                break
        time.sleep(0.1)
    assert time.monotonic() < until
    assert "still running after" in (results / "endless.failed.txt").read_text()
    assert started(script) == ["endless"]  # nothing was left for the other
    assert "| good_one | a | open |" in (results / "README.md").read_text()


def test_what_does_not_fit_is_not_started_but_a_shorter_one_is(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all([Check(("good-long",), 100, "f"), GOOD], script.with_name("results"), 30, script, [])
    assert started(script) == ["good"]
    assert "good_long: not started, it needs about 100 s" in capsys.readouterr().out


def test_cost_stops_itself_before_it_would_be_ended(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_all([Check(("cost", "lookahead"), 1, "g")], script.with_name("results"), 300, script, ["x=1"])
    noise = (script.parent / "logs" / "cost_lookahead.log").read_text().splitlines()[0].split()
    assert float(noise[noise.index("--seconds") + 1]) == pytest.approx(300 - 1 - gpu_checks.COUNTING, abs=2)
    assert noise[noise.index("--results") + 1] == str(script.with_name("results"))
    assert noise[-1] == "x=1"


def test_without_a_gpu_no_result_goes_where_those_of_gpus_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr("sys.argv", ["gpu_checks", "--seconds", "540"])
    with pytest.raises(SystemExit, match=r"no GPU here: .*--results runs/rehearsal hardware=cpu"):
        gpu_checks.main()


def test_a_first_quarter_of_an_hour_is_the_first_two() -> None:
    assert [check.name for check in CHECKS[:3]] == ["exact_lookahead", "cost_lookahead", "exact_snapshot"]
    assert sum(check.seconds for check in CHECKS[:2]) < 15 * 60
    assert all(check.seconds < 540 - gpu_checks.ENDING for check in CHECKS)


def test_a_table_of_windows() -> None:
    metrics = {step: {"r": float(step)} for step in range(1, 6)} | {0: {"v": 0.5}, 4: {"r": 4.0, "v": 0.7}}
    assert table(metrics, 2, {"validation": "v", "reward": "r"}).splitlines()[2:] == [
        "| 0 | 0.5 |  |",
        "| 1 to 2 |  | 1.5 |",
        "| 3 to 4 | 0.7 | 3.5 |",
        "| 5 to 5 |  | 5 |",
    ]


def test_a_key_that_no_step_has_is_told_behind_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "data": {"r": 2.0}}\n')
    monkeypatch.setattr("sys.argv", ["windows", str(metrics), "reward=r", "x=nothing"])
    with pytest.raises(SystemExit, match="nothing: no step has it"):
        main()
    assert capsys.readouterr().out.splitlines()[-1] == "| 1 to 1 | 2 |  |"


def test_figures_with_a_table_are_markdown(tmp_path: Path) -> None:
    facts = {"card": "a card", "seconds": 1, "command": "c", "date": "d", "packages": "p"}
    for name, text in {"a": "lookahead: 25 steps\n| phase |", "b": "prefix 2e-6"}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**facts, "figures": text}))
    page = render([Check((name,), 1, "it") for name in "ab"], tmp_path)
    assert "p\n\nlookahead: 25 steps\n| phase |\n" in page
    assert "```\nprefix 2e-6\n```" in page
