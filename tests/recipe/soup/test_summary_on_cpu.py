"""The summary at a run's end, from a log in the form of verl's file logger."""

import json
from pathlib import Path

from recipe.soup.summary import summary, validation_accuracy


def write(path: Path, entries: dict[int, dict[str, float]]) -> Path:
    path.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in entries.items()))
    return path


def test_summary(tmp_path: Path) -> None:
    accuracy = "val-core/countdown/acc/mean@16"
    step = {
        "timing_s/step": 2.0,
        "timing_s/gen": 1.25,
        "soup/train/prefix/tokens": 40.0,
        "soup/train/prefix/share": 0.25,
        "soup/train/prefix/ratio_at_start/max": 1.75,
        "soup/train/continuation/engine_mismatch/max": 2e-6,
    }
    path = write(tmp_path / "soup.jsonl", {0: {accuracy: 0.125}, 1: step, 2: {**step, accuracy: 0.25}})
    text = summary(path)
    for words in ("2 steps", "0.125 after step 0, 0.250 after step 2", "gen 1.25", "25%", "1.75", "2.0e-06"):
        assert words in text
    assert str(tmp_path / "soup" / "samples") in text
    assert validation_accuracy({5: {"val-aux/countdown/acc/mean@16": 1.0}}) == {}


def test_summary_of_a_run_that_was_killed_before_its_first_step(tmp_path: Path) -> None:
    assert "0 steps" in summary(write(tmp_path / "soup.jsonl", {}))
