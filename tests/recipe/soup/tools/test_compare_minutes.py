"""`--minutes`: a study in pieces, each of which leaves finished runs."""

import sys
from pathlib import Path
from typing import Any

import pytest

from recipe.soup.tools.compare import execute as execution
from recipe.soup.tools.compare import time_limit
from recipe.soup.tools.compare.execute import execute
from recipe.soup.tools.compare.one_run import Run
from recipe.soup.tools.compare.study import Study
from recipe.soup.tools.compare.time_limit import ENDING, TimeLimit

STUDY: dict[str, Any] = {
    "driver": "lab",
    "baseline": "grpo",
    "seeds": [0, 1, 2],
    "common": [],
    "runs": {"grpo": ["algorithm=grpo"], "soup": ["algorithm=soup"]},
}


def test_a_run_starts_only_if_the_longest_so_far_would_still_end_in_time() -> None:
    now = 100.0
    limit = TimeLimit(10, clock=lambda: now)
    assert limit.allows_another
    limit.started("a")
    limit.started("b")
    now += 200
    limit.ended("a")
    now += 50
    limit.ended("b")
    now = 100 + 600 - ENDING - 251
    assert limit.allows_another
    now += 2
    assert not limit.allows_another
    assert not limit.is_over
    now = 100 + 600 - ENDING
    assert limit.is_over


def test_without_a_limit_there_is_always_time() -> None:
    limit = TimeLimit(None)
    assert limit.allows_another
    assert not limit.is_over


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_no_time_is_refused(minutes: float, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"--minutes={minutes}: leaves no time"):
        execute(Study(**STUDY), tmp_path, jobs=1, minutes=minutes)


def runs_that_take(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """In place of the lab, a script that sleeps, and leaves a checkpoint before it does; returns the file of starts."""
    script = tmp_path / "driver.py"
    script.write_text(
        "import os, sys, time, pathlib\n"
        "metrics = pathlib.Path(os.environ['VERL_FILE_LOGGER_PATH'])\n"
        "tracker = metrics.parent / 'checkpoints/latest_checkpointed_iteration.txt'\n"
        "went_on = tracker.exists()\n"
        f"starts = pathlib.Path({str(tmp_path / 'starts')!r})\n"
        "starts.open('a').write(f'{metrics.parent.parent.name} {went_on}\\n')\n"
        "tracker.parent.mkdir(exist_ok=True)\n"
        "tracker.write_text('1')\n"
        "time.sleep(0 if went_on else float(sys.argv[1]))\n"
        'metrics.write_text(\'{"step": 0, "data": {}}\')\n'
    )

    def command(run: Run, driver: str) -> list[str]:
        return [sys.executable, str(script), str(seconds[run.name]), *run.overrides]

    monkeypatch.setattr(execution, "command", command)
    monkeypatch.setattr(execution, "POLL_SECONDS", 0.05)
    return tmp_path / "starts"


def test_what_is_still_running_when_the_time_is_up_goes_on_with_the_next_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    starts = runs_that_take({"grpo": 0.1, "soup": 100.0}, monkeypatch, tmp_path)
    monkeypatch.setattr(time_limit, "ENDING", 0.0)
    study, out = Study(**{**STUDY, "seeds": [0]}), tmp_path / "out"
    assert execute(study, out, jobs=2, minutes=0.1, records=tmp_path / "records") == []
    assert [run.is_done for run in study.in_folder(out)] == [True, False]
    assert sorted(starts.read_text().splitlines()) == ["grpo False", "soup False"]
    assert execute(study, out, jobs=2, minutes=0.2, records=tmp_path / "records") == []
    assert all(run.is_done for run in study.in_folder(out))
    assert starts.read_text().splitlines()[2:] == ["soup True"]
    assert sorted(path.parent.parent.name for path in (tmp_path / "records").rglob("done")) == ["grpo", "soup"]


def test_nothing_is_started_that_would_not_end_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    starts = runs_that_take({"grpo": 5.0, "soup": 5.0}, monkeypatch, tmp_path)
    monkeypatch.setattr(time_limit, "ENDING", 0.0)
    study = Study(**STUDY)
    assert execute(study, tmp_path / "out", jobs=2, minutes=0.15) == []
    done = [run for run in study.in_folder(tmp_path / "out") if run.is_done]
    assert len(done) == len(starts.read_text().splitlines()) == 2


GRACE = "algorithm.soup.sigterm_grace"


@pytest.mark.parametrize(("grace", "killed"), [(0.0, True), (0.3, True), (30.0, False)])
def test_a_run_that_is_asked_to_end_is_waited_for_and_not_for_ever(
    grace: float, killed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last words take a second, which it has only with a grace that long."""
    script = tmp_path / "driver.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "time.sleep(100)\n"
    )
    monkeypatch.setattr(execution, "command", lambda run, driver: [sys.executable, str(script), *run.overrides])
    monkeypatch.setattr(execution, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(execution, "LEAVING_SECONDS", 0.1)
    monkeypatch.setattr(time_limit, "ENDING", 0.0)
    given = [f"{GRACE}={grace}"] if grace else []
    study = Study(**{**STUDY, "seeds": [0], "runs": {"grpo": ["algorithm=grpo", *given]}})
    # Its time begins to run out when it has started.
    monkeypatch.setattr(time_limit.TimeLimit, "is_over", property(lambda _: (tmp_path / "started").exists()))
    assert execute(study, tmp_path / "out", jobs=1, minutes=1) == []
    told = capsys.readouterr().out
    assert (f"is asked to end: it may take {grace:g} s to save a checkpoint ({GRACE})" in told) == (grace > 0)
    assert ("was killed; it goes on at its last checkpoint" in told) == killed
    assert (tmp_path / "saved").exists() != killed


def test_minutes_keep_the_grace_back() -> None:
    now = 0.0
    limit = TimeLimit(10, 120.0, clock=lambda: now)
    now = 600 - ENDING - 121
    assert not limit.is_over
    now += 1
    assert limit.is_over
    with pytest.raises(SystemExit, match=r"--minutes=2: leaves no time .*sigterm_grace=110 seconds"):
        TimeLimit(2, 110.0)


def test_a_grace_that_is_no_number_is_refused(tmp_path: Path) -> None:
    run = Run("soup", 0, [f"{GRACE}=30", f"{GRACE}=${{trainer.save_freq}}"], tmp_path)
    with pytest.raises(SystemExit, match=rf"^{GRACE}=\${{trainer.save_freq}}: a study needs it as a number"):
        run.grace  # noqa: B018
