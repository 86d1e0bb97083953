"""What only shows later ends with its own cause: the last line of a failed run's terminal."""

from pathlib import Path

import pandas as pd
import pytest
from real_run import STARTED, RealRun

pytestmark = pytest.mark.real_more


def test_samples_that_cannot_be_graded_are_named_and_not_verls_advice(
    tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    """Plain verl, whose trainer sees only that no sample came; the checks of a start would have refused it."""
    row = {"data_source": "x", "prompt": [{"role": "user", "content": "3 5=8:"}], "reward_model": {"style": "rule"}}
    pd.DataFrame([row] * 16).to_parquet(tmp_path / "rows.parquet")
    files = (f"data.train_files={tmp_path}/rows.parquet", f"data.val_files={tmp_path}/rows.parquet")
    run = RealRun(tmp_path / "run", clean_environ, "algorithm=verl", "~hydra.callbacks.start", *files)
    assert run.finish(STARTED) != 0
    assert "sync_refill_failed_groups" in run.terminal
    assert run.terminal.splitlines()[-1] == "The run failed: KeyError: 'ground_truth'"
