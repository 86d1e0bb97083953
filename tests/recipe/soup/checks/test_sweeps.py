"""Jobs of one sweep: each in a folder of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from recipe.soup.checks.sweeps import check_sweep

SEEDS = "data.seed=1,2"


def sweep(composed: Any, *overrides: str) -> Any:
    """The config of a whole sweep, in which what is swept has its value from the files."""
    given = [text for text in overrides if "," not in text]
    config = composed("algorithm=soup", "example=countdown", *given)
    OmegaConf.set_struct(config, False)
    config.hydra = {"overrides": {"task": list(overrides)}}
    return config


@pytest.mark.parametrize(
    "overrides",
    [
        (SEEDS, "trainer.experiment_name=soup-${data.seed}"),
        (
            SEEDS,
            "trainer.default_local_dir=runs/${data.seed}/checkpoints",
            "trainer.rollout_data_dir=null",
            "trainer.validation_data_dir=runs/${data.seed}/validation",
            "trainer.project_name=runs/${data.seed}",
        ),
        (
            SEEDS,
            "trainer.default_local_dir=runs/${data.seed}/checkpoints",
            "trainer.rollout_data_dir=null",
            "trainer.validation_data_dir=null",
            "trainer.logger=console",
        ),
        ("trainer.experiment_name=a,b",),
        ("data.seed=1",),
        ("trainer.logger=[console,file]", "algorithm.soup.lag=4"),
    ],
)
def test_jobs_with_folders_of_their_own_are_let_through(overrides: tuple[str, ...], composed: Any) -> None:
    config = sweep(composed, *overrides)
    before = OmegaConf.to_yaml(config)
    check_sweep(config)
    assert OmegaConf.to_yaml(config) == before


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ((SEEDS,), "data.seed=1,2"),
        (("data.seed=range(1,3)",), r"data.seed=range\(1,3\)"),
        ((SEEDS, "trainer.experiment_name=a,b"), "data.seed=1,2"),
        ((SEEDS, "algorithm.soup.lag=2,4", "trainer.experiment_name=soup-${data.seed}"), "algorithm.soup.lag=2,4"),
        (("+algorithm.soup.new=2,4",), "algorithm.soup.new=2,4"),
    ],
)
def test_jobs_that_share_one_are_refused(overrides: tuple[str, ...], key: str, composed: Any) -> None:
    with pytest.raises(SystemExit, match=rf"^{key}: .*default_local_dir=runs/countdown/.*'trainer.experiment_name="):
        check_sweep(sweep(composed, *overrides))


def test_the_cure_names_every_key_at_once_and_cures(composed: Any) -> None:
    swept = (SEEDS, "algorithm.soup.lag=2,4")
    for name in ((), ("trainer.experiment_name=soup-${data.seed}",)):
        with pytest.raises(SystemExit) as refused:
            check_sweep(sweep(composed, *swept, *name))
        cure = str(refused.value).rpartition(" with '")[2].removesuffix("'.")
        assert cure == "trainer.experiment_name=soup-${data.seed}-${algorithm.soup.lag}"
        check_sweep(sweep(composed, *swept, cure))


def test_samples_that_would_share_a_folder_are_refused_as_well(composed: Any) -> None:
    named = (SEEDS, "trainer.experiment_name=soup-${data.seed}", "trainer.rollout_data_dir=samples")
    with pytest.raises(SystemExit, match=r"^data.seed=1,2: .* write to trainer.rollout_data_dir=samples"):
        check_sweep(sweep(composed, *named))


def test_metrics_that_would_share_a_file_are_refused_as_well(composed: Any) -> None:
    own = [
        f"trainer.{key}=runs/${{data.seed}}" for key in ("default_local_dir", "rollout_data_dir", "validation_data_dir")
    ]
    with pytest.raises(SystemExit, match=r"^data.seed=1,2: .* write to the metrics file .*\.jsonl; "):
        check_sweep(sweep(composed, SEEDS, *own))


def test_main_ppo_refuses_such_a_sweep_before_its_first_job(tmp_path: Path, clean_environ: dict[str, str]) -> None:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--multirun", "algorithm=soup", "hardware=cpu"]
    command += ["example=countdown", SEEDS]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "'trainer.experiment_name=soup-${data.seed}'" in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert not (tmp_path / "runs").exists()
