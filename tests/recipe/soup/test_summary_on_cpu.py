"""The summary at a run's end, from a log in the form of verl's file logger."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipe.soup.callbacks import metrics_file
from recipe.soup.summary import summary, validation_accuracy


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
