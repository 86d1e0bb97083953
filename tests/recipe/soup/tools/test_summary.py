"""The summary at a run's end, from a log in the form of verl's file logger."""

import json
import os
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from recipe.soup.records.metrics_file import keep_earlier_metrics, metrics_file, read_metrics, validation_accuracy
from recipe.soup.tools.callbacks import ShowResult
from recipe.soup.tools.summary import summary


def write(path: Path, entries: dict[int, dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in entries.items()))
    return path


def test_summary(tmp_path: Path) -> None:
    accuracy = "val-core/countdown/acc/mean@16"
    before = {accuracy: 0.125, "soup/val/countdown/pass@4": 0.4, "soup/val/other/pass@4": 0.6}
    after = {accuracy: 0.25, "soup/val/countdown/pass@4": 0.7, "soup/val/other/pass@4": 0.8}
    step = {
        "timing_s/step": 2.0,
        "timing_s/gen": 1.25,
        "soup/train/prefix/tokens": 40.0,
        "soup/train/prefix/share": 0.25,
        "soup/train/prefix/ratio_at_start/max": 1.75,
        "soup/train/continuation/engine_mismatch/max": 2e-6,
    }
    steps = {number: {**step, "critic/score/mean": number / 8} for number in range(1, 8)}
    path = write(tmp_path / "soup.jsonl", {0: before, **steps, 8: {**step, "critic/score/mean": 1.0, **after}})
    text = summary(path, {"samples": "some/where"})
    for words in ("8 steps", "gen 1.25", "25%", "1.75", "2.0e-06", "samples in some/where"):
        assert words in text
    rows = {words[0]: words[1:] for words in map(str.split, text.splitlines())}
    assert rows["accuracy"] == ["0.125", "0.250"]
    assert rows["pass@4"] == ["0.500", "0.750"]
    assert rows["reward"] == ["0.188", "0.938"]
    assert validation_accuracy({5: {"val-aux/countdown/acc/mean@16": 1.0}}) == {}


def test_one_validation_is_one_column_and_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    prefix = {"soup/train/prefix/tokens": 1.0, "soup/train/prefix/share": 0.5}
    step = {"timing_s/step": 1.0, **prefix, "soup/train/prefix/ratio_at_start/max": None, "actor/entropy": None}
    path = write(tmp_path / "soup.jsonl", {1: {**step, "val-core/countdown/acc/mean@16": 0.5}})  # pyright: ignore[reportArgumentType]
    lines = summary(path, {}).splitlines()
    assert lines[1].split() == ["validation,", "never", "mixed", "step", "1"]
    assert lines[2].split() == ["accuracy", "0.500"]


def result(folder: Path, monkeypatch: pytest.MonkeyPatch, status: JobStatus, logger: list[str]) -> None:
    monkeypatch.chdir(folder)
    (folder / "countdown").mkdir()
    (folder / "old").mkdir()
    os.utime(folder / "old", (1, 1))
    trainer = {"project_name": "countdown", "experiment_name": "one", "logger": logger, "resume_mode": "disable"}
    folders = {"rollout_data_dir": None, "validation_data_dir": "new", "default_local_dir": "old"}
    config = OmegaConf.create({"trainer": {**trainer, **folders}})
    callback = ShowResult()
    callback.on_job_start(config)
    (folder / "new").mkdir()
    write(folder / "countdown/one.jsonl", {1: {"timing_s/step": 2.0}})
    callback.on_job_end(config, JobReturn(status=status))


def test_the_result_is_shown_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    result(tmp_path, monkeypatch, JobStatus.COMPLETED, ["console", "file"])
    out = capsys.readouterr().out
    assert "one.jsonl: 1 steps" in out
    assert "validation samples in new" in out
    assert "checkpoints" not in out  # of an earlier run
    assert (tmp_path / "countdown/one.png").exists()


@pytest.mark.parametrize(
    ("status", "logger"), [(JobStatus.FAILED, ["console", "file"]), (JobStatus.COMPLETED, ["console"])]
)
def test_no_result_no_words(
    status: JobStatus, logger: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    result(tmp_path, monkeypatch, status, logger)
    assert not capsys.readouterr().out


def test_a_resumed_run_keeps_the_metrics_from_before(tmp_path: Path) -> None:
    """Killed in step 5, and again in step 7, with checkpoints of steps 2 and 5: the file logger begins anew there."""
    path = tmp_path / "one.jsonl"
    for attempt, (resumed_at, end) in enumerate([(0, 5), (2, 7), (5, 7)]):
        keep_earlier_metrics(path, resumed_at)
        validation = {"step": resumed_at, "data": {"validated": attempt, "nothing": None}}
        training = [{"step": step, "data": {"trained": attempt}} for step in range(resumed_at + 1, end)]
        path.write_text("".join(json.dumps(row) + "\n" for row in [validation, *training]))
    with path.open("a") as file:
        file.write('{"step": 7, "da')  # killed while it wrote
    metrics = read_metrics(path)
    assert {step: values.get("trained") for step, values in metrics.items()} == {
        0: None,
        1: 0,
        2: 0,
        3: 1,
        4: 1,
        5: 1,
        6: 2,
    }
    assert {s: values["validated"] for s, values in metrics.items() if "validated" in values} == {0: 0, 2: 1, 5: 2}
    keep_earlier_metrics(path, 0)  # a run that starts anew in the same place
    assert not path.exists()
    assert list(read_metrics(tmp_path / "one.1.jsonl")) == list(range(7))
    keep_earlier_metrics(path, 5)
    with pytest.raises(SystemExit, match="cannot be read"):
        read_metrics(path)


def test_a_broken_file_of_metrics_ends_no_run(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"step": 1, "da\n{"step": 2, "data": {}}\n')
    said = keep_earlier_metrics(path, resumed_at=2)
    assert said is not None
    assert "line 1 is no JSON" in said
    assert said.endswith(f"are put aside in {path}.broken.")
    assert not path.exists()
    assert (tmp_path / "one.jsonl.broken").exists()


def test_summary_of_a_run_that_was_killed_before_its_first_step(tmp_path: Path) -> None:
    assert "0 steps" in summary(write(tmp_path / "soup.jsonl", {}), {})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "countdown/one.jsonl"),
        ({"VERL_FILE_LOGGER_ROOT": "here"}, "here/countdown/one.jsonl"),
        ({"VERL_FILE_LOGGER_ROOT": "here", "VERL_FILE_LOGGER_PATH": "that.jsonl"}, "that.jsonl"),
    ],
)
def test_metrics_are_looked_for_where_verl_writes_them(
    environ: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.utils.tracking import FileLogger

    monkeypatch.chdir(tmp_path)
    for key in ("VERL_FILE_LOGGER_ROOT", "VERL_FILE_LOGGER_PATH"):
        monkeypatch.delenv(key, raising=False)
    config = OmegaConf.create(
        {
            "trainer": {"project_name": "countdown", "experiment_name": "one"},
            "ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": environ}}},
        }
    )
    assert metrics_file(config) == Path(expected)
    (tmp_path / "here").mkdir()
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    FileLogger("countdown", "one").finish()
    assert (tmp_path / expected).exists()
