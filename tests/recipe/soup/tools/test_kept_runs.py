"""What is kept of finished runs: enough for the same tables, and never run again."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from recipe.soup.tools.cli import main
from recipe.soup.tools.compare import execute as execution
from recipe.soup.tools.compare.kept_runs import is_recorded, read_record, read_run, write_record
from recipe.soup.tools.compare.one_run import Run
from recipe.soup.tools.compare.report import at_steps, difference_table, end_table
from recipe.soup.tools.compare.results import Result, figures, generated_tokens
from recipe.soup.tools.compare.study import Study

STUDY: dict[str, Any] = {
    "driver": "lab",
    "baseline": "grpo",
    "seeds": [0, 1],
    "common": [],
    "runs": {"grpo": ["algorithm=grpo"], "soup": ["algorithm=soup"]},
    "steps": [2],
}
PROBLEMS, TRIES = 5, 4


def write_logs(run: Run, correct: dict[int, int]) -> None:
    """A run of four steps; `correct`: right samples of each problem at each validation."""
    run.folder.mkdir(parents=True)
    rows = []
    for step in range(5):
        data: dict[str, float] = {"timing_s/step": 1.5, "soup/train/groups_with_signal": 0.1 * step}
        data |= {"soup/train/continuation/tokens": 1003.0, "soup/cost/seed_tokens": 17.0, "actor/entropy": 0.3}
        data |= {"critic/score/mean": 0.2, "perf/nobody/needs/this": 1.0}
        if step in correct:
            data |= {"val-core/x/acc/mean@4": correct[step] / TRIES, "soup/val/entropy": 0.25 + run.seed}
            run.validation.mkdir(exist_ok=True)
            scores = [float(n < correct[step]) for n in range(TRIES)]
            samples = [{"input": f"p{i}", "output": "", "score": score} for i in range(PROBLEMS) for score in scores]
            (run.validation / f"{step}.jsonl").write_text("\n".join(map(json.dumps, samples)))
        rows.append({"step": step, "data": data})
    run.metrics.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def finished(tmp_path: Path) -> list[Run]:
    runs = Study(**STUDY).in_folder(tmp_path / "out")
    for run in runs:
        ours = int(run.name == "soup")
        write_logs(run, {0: 0, 2: 1 + ours, 4: 2 + 2 * ours})
        run.mark_done()
    return runs


def by_name(results: list[Result]) -> dict[str, list[Result]]:
    names = dict.fromkeys(result.name for result in results)
    return {name: [result for result in results if result.name == name] for name in names}


def test_a_record_gives_the_tables_of_its_run(finished: list[Run], tmp_path: Path) -> None:
    records = tmp_path / "records"
    for run in finished:
        write_record(run, read_run(run), records)
    pairs = [(read_run(run), read_record(run, records)) for run in finished]
    for run, record in pairs:
        assert record.validations == run.validations
        assert figures(record) == pytest.approx(figures(run), rel=1e-6)
        assert generated_tokens(record).tolist() == generated_tokens(run).tolist()
    runs, kept = (by_name([pair[i] for pair in pairs]) for i in (0, 1))
    for table in (end_table, lambda results: difference_table(results, "grpo")):
        pd.testing.assert_frame_equal(table(runs), table(kept))
    assert not any("nobody" in key for metrics in pairs[0][1].metrics.values() for key in metrics)


def test_a_record_of_plain_verl_tells_its_tokens(finished: list[Run], tmp_path: Path) -> None:
    """Without our metrics they come from three of verl's own."""
    run = finished[0]
    data = {"perf/total_num_tokens": 1280.0, "prompt_length/mean": 9.0, "response_length/mean": 11.0}
    run.metrics.write_text("\n".join(json.dumps({"step": step, "data": data}) for step in (1, 2)))
    write_record(run, read_run(run), tmp_path / "records")
    assert generated_tokens(read_record(run, tmp_path / "records")).tolist() == [704, 704]


def test_a_run_that_was_done_before_records_were_kept_is_recorded(finished: list[Run], tmp_path: Path) -> None:
    records = tmp_path / "records"
    assert execution.execute(Study(**STUDY), tmp_path / "out", jobs=1, records=records) == []
    assert all(is_recorded(run, records) for run in finished)


def test_a_record_is_of_its_own_settings_only(finished: list[Run], tmp_path: Path) -> None:
    records = tmp_path / "records"
    for run in finished:
        write_record(run, read_run(run), records)
    elsewhere = Study(**STUDY).in_folder(tmp_path / "another machine")
    assert all(is_recorded(run, records) for run in elsewhere)
    changed = Study(**{**STUDY, "common": ["data.train_batch_size=3"]})
    assert not any(is_recorded(run, records) for run in changed.in_folder(tmp_path / "out"))
    with pytest.raises(SystemExit, match=r"--records=.*grpo seed 0 was kept with other settings"):
        execution.execute(changed, tmp_path / "new", jobs=1, records=records)


def test_the_next_machine_runs_what_is_missing(
    finished: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, study = tmp_path / "records", tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(STUDY))
    for run in finished[:3]:
        write_record(run, read_run(run), records)
    script = "import os, pathlib; pathlib.Path(os.environ['VERL_FILE_LOGGER_PATH']).write_text({!r})"
    script = script.format(finished[3].metrics.read_text())
    started: list[tuple[str, int]] = []

    def command(run: Run, driver: str) -> list[str]:
        started.append((run.name, run.seed))
        return [sys.executable, "-c", script]

    monkeypatch.setattr(execution, "command", command)
    monkeypatch.setattr("recipe.soup.tools.compare.run.check_runs", lambda *given: None)  # its runs are made up
    arguments = ["compare", str(study), "--out", str(tmp_path / "new"), "--records", str(records)]
    monkeypatch.setattr(sys, "argv", ["soup", *arguments])
    main()
    assert started == [("soup", 1)]
    assert (records / "soup" / "seed_1" / "metrics.parquet").exists()
    report = (tmp_path / "new" / "report.md").read_text()
    assert report.index("After step 2") < report.index("After training")
    main()
    assert started == [("soup", 1)]


def test_named_steps_see_nothing_of_what_came_later(finished: list[Run]) -> None:
    results = by_name([read_run(run) for run in finished])
    then = at_steps(results, [2, 3])
    assert list(then) == ["After step 2", "After training"]  # nothing was validated after step 3
    middle = then["After step 2"]["soup"][0]
    assert middle.after == {f"p{i}": (2, TRIES) for i in range(PROBLEMS)}
    assert figures(middle)["training groups with signal"] == pytest.approx((0 + 0.1 + 0.2) / 3)
    assert figures(middle)["tokens generated"] == 3 * 1020
    differences = difference_table(then["After step 2"], "grpo")
    assert differences.loc["soup", "pass@1"] == "+0.250 (+0.250 to +0.250)"
    assert then["After training"]["soup"][0].after["p0"] == (4, TRIES)


def test_a_killed_run_goes_on_only_with_its_own_settings(finished: list[Run], tmp_path: Path) -> None:
    """With a checkpoint of the very same settings its folder is kept; else it starts anew."""
    run = finished[0]
    process = execution.start(run, "lab")  # no checkpoint: anew
    process.kill()
    process.wait()
    assert not run.metrics.exists()
    tracker = run.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir()
    tracker.write_text("2")
    (run.folder / "marker").touch()
    told = run.folder / "command.txt"
    told.write_text(told.read_text().replace(sys.executable, "/another/name/of/python"))
    process = execution.start(run, "lab")
    process.kill()
    process.wait()
    assert (run.folder / "marker").exists()
    other = Run(run.name, run.seed, [*run.overrides, "data.seed=9"], run.folder)
    process = execution.start(other, "lab")
    process.kill()
    process.wait()
    assert not (run.folder / "marker").exists()
