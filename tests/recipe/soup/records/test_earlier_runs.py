"""Runs of one name: nothing of the first is written over, and nothing of anybody else's is moved."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from recipe.soup.checks.outputs import check_outputs
from recipe.soup.records.earlier_runs import check_free, folders, hold, hold_all, put_aside, started_anew
from recipe.soup.records.metrics_file import keep_earlier_metrics, read_metrics

HOLDS = "import sys, time; from pathlib import Path; from recipe.soup.records.earlier_runs import hold; "
HOLDS += "lock = hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_each_earlier_run_is_kept_and_what_is_no_runs_stays(tmp_path: Path) -> None:
    checkpoints, samples = tmp_path / "checkpoints", tmp_path / "samples"
    written = {"global_step_20/data.pt", "global_step_20/actor/model.pt", "latest_checkpointed_iteration.txt"}
    for number in (1, 2):
        write(checkpoints, *written, "notes.txt", "my_data.jsonl")
        write(samples, "1.jsonl", "20.jsonl")
        said = put_aside([checkpoints, samples, samples, tmp_path / "not there"])
        assert said is not None
        assert f"{checkpoints}/earlier_{number}, {samples}/earlier_{number}." in said
    assert files(checkpoints / "earlier_1") == files(checkpoints / "earlier_2") == written
    assert files(samples / "earlier_1") == {"1.jsonl", "20.jsonl"}
    assert {name for name in files(checkpoints) if "earlier" not in name} == {"notes.txt", "my_data.jsonl"}
    assert put_aside([checkpoints, samples]) is None


def test_metrics_of_earlier_runs_are_kept_with_those_from_before_their_resume(tmp_path: Path) -> None:
    path = tmp_path / "soup.jsonl"
    for number in (1, 2):
        path.write_text('{"step": 3, "data": {"a": 1}}\n')
        keep_earlier_metrics(path, resumed_at=3)
        path.write_text('{"step": 4, "data": {"a": 1}}\n')
        keep_earlier_metrics(path, resumed_at=0)
        assert not path.exists()
        assert list(read_metrics(tmp_path / f"soup.{number}.jsonl")) == [3, 4]


def test_two_runs_at_a_time_are_refused_until_the_first_has_ended(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    config = composed("algorithm=soup", "example=countdown", f"trainer.default_local_dir={tmp_path}/checkpoints")
    (tmp_path / "checkpoints").mkdir()
    check_free(config)
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "checkpoints")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError):
            hold(tmp_path / "checkpoints")
        with pytest.raises(SystemExit, match=r"default_local_dir=.*: another run writes there .*experiment_name"):
            check_free(config, seconds=0)
        with pytest.raises(SystemExit, match=r"default_local_dir=.*: another run writes there .*experiment_name"):
            hold_all(config)
        other.kill()
    check_free(config, seconds=10)


def test_two_keys_may_lead_to_one_place_which_is_held_once(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "here")
    places = ["trainer.default_local_dir=here", "trainer.rollout_data_dir=there", "trainer.validation_data_dir=null"]
    config = composed(
        "algorithm=soup", "example=countdown", *(place.replace("=", f"={tmp_path}/") for place in places[:2]), places[2]
    )
    hold_all(config)
    hold_all(config)  # by the same process
    with pytest.raises(BlockingIOError):
        hold(tmp_path / "here")


def test_where_a_run_writes(composed: Callable[..., Any]) -> None:
    config = composed("algorithm=soup", "example=countdown", "trainer.validation_data_dir=null")
    assert {key: str(path) for key, path in folders(config).items()} == {
        "trainer.default_local_dir": "runs/countdown/soup/checkpoints",
        "trainer.rollout_data_dir": "runs/countdown/soup/samples",
    }


def test_a_mere_validation_leaves_the_checkpoints_where_they_are(composed: Callable[..., Any]) -> None:
    config = composed("algorithm=soup", "example=countdown", "trainer.val_only=true")
    assert {path.name for path in started_anew(config)} == {"samples", "validation"}


def test_weights_that_a_run_would_put_aside_are_refused(composed: Callable[..., Any], tmp_path: Path) -> None:
    weights = tmp_path / "checkpoints" / "global_step_4" / "actor" / "huggingface"
    places = [f"trainer.default_local_dir={tmp_path}/checkpoints", f"actor_rollout_ref.model.path={weights}"]
    config = composed("algorithm=soup", "example=countdown", *places, "trainer.resume_mode=disable")
    with pytest.raises(SystemExit, match=r"model.path=.*: lies in trainer.default_local_dir=.*experiment_name"):
        check_outputs(config)
    config.trainer.val_only = True
    check_outputs(config)
