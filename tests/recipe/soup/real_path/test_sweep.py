"""Two jobs of one sweep of Hydra's."""

from pathlib import Path

import pytest
from real_run import STARTED, RealRun

from recipe.soup.records.metrics_file import read_metrics

pytestmark = pytest.mark.real_more

SWEEP = (
    "--multirun",
    "hardware=cpu",
    "example=countdown",
    "algorithm=soup",
    "trainer.total_training_steps=2",
    "trainer.val_before_train=false",
    "data.val_max_samples=16",
    "data.seed=1,2",
    "trainer.experiment_name=soup-${data.seed}",
)


def test_each_job_of_a_sweep_leaves_what_a_run_leaves(tmp_path: Path, clean_environ: dict[str, str]) -> None:
    run = RealRun(tmp_path, clean_environ, *SWEEP, common=())
    assert run.finish(2 * STARTED) == 0, run.terminal[-4000:]
    runs = tmp_path / "runs" / "countdown"
    for name in ("soup-1", "soup-2"):
        assert [path.name for path in (runs / name).glob("verl.log*")] == ["verl.log"]
        assert list(read_metrics(runs / f"{name}.jsonl")) == [1, 2]
        assert (runs / name / "checkpoints" / "global_step_2" / "actor").is_dir()
        assert {path.name for path in (runs / name / "samples").iterdir()} == {"1.jsonl", "2.jsonl"}
        assert {path.name for path in (runs / name / "validation").iterdir()} == {"2.jsonl"}
    assert {path.stem for path in runs.iterdir()} == {"soup-1", "soup-2"}  # nothing was put aside
