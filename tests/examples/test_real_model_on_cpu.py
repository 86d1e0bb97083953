"""SmolLM2 through the whole real path, as its README says: training, verify, show. Run by `make real-model`."""

import subprocess
import sys
from pathlib import Path

import pytest
from real_run import RealRun

from recipe.soup.verify import read_samples

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "runs/smollm2"
OVERRIDES = (
    "algorithm=soup",
    "hardware=cpu",
    "example=smollm2",
    f"actor_rollout_ref.model.path={BUILT}/model",
    f"data.train_files={BUILT}/data/train.parquet",
    f"data.val_files={BUILT}/data/val.parquet",
    "algorithm.soup.warm_start=pure",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=1",
    "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
    "trainer.default_local_dir=checkpoints",
    "trainer.rollout_data_dir=samples",
    "hydra.callbacks.console.log=log.txt",
)
MINUTES_15 = 900.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    for path in (BUILT / "model/model.safetensors", BUILT / "data/train.parquet"):
        assert path.exists(), f"no {path}: `make real-model` builds it first."
    run = RealRun(tmp_path_factory.mktemp("smollm2"), clean_environ, common=OVERRIDES)
    assert run.finish(MINUTES_15) == 0, run.log[-4000:]
    return run


def test_every_token_entered_the_loss_under_the_policy_that_sampled_it(run: RealRun) -> None:
    where = ["--samples", str(run.samples), "--checkpoints", str(run.checkpoints), "--base-model", f"{BUILT}/model"]
    bounds = ["--mean", "2e-5", "--largest", "2e-4"]
    command = [sys.executable, "-m", "recipe.soup.verify", *where, *bounds]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_half_of_the_samples_are_mixed_and_each_token_has_its_version(run: RealRun) -> None:
    for step, rows in read_samples(run.samples).items():
        assert len(rows) == 32
        assert sum(row["prefix_length"] > 0 for row in rows) == (16 if step >= 3 else 0)
        for row in rows:
            length, whole = row["prefix_length"], len(row["response_ids"])
            assert row["policy_versions"] == [step - 3] * length + [step - 1] * (whole - length)


def test_history_is_shown(run: RealRun) -> None:
    command = [sys.executable, "-m", "recipe.soup.cli", "show", str(run.folder), "--step", "4"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(shown)
    assert shown.count("⟦") >= 16
    assert "Answer with the number only." in shown
