"""A checkpoint is whole or not there; verl's `_save_checkpoint` is played by what it leaves, with its own rotation."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

from recipe.soup.records.earlier_runs import TRACKER, hold
from recipe.soup.verl_adapter.checkpoint_stage import CheckpointStage
from recipe.soup.verl_adapter.step_state import StepState
from verl_ext.health import RunEndedError
from verl_ext.stop_request import ask_to_stop


class Verl(PPOTrainer):
    """Saves as verl does, rotation included, up to `fails_at`."""

    fails_at = ""

    def __init__(self, folder: Path, **trainer: Any) -> None:
        keys = {"default_local_dir": str(folder), "max_actor_ckpt_to_keep": None, "resume_mode": "disable"} | trainer
        self.config = OmegaConf.create({"trainer": keys})
        self.settings = SimpleNamespace(sigterm_grace=60)
        self.source = SimpleNamespace(
            save=lambda folder: (folder / "soup_bank.npz").touch(), harvest=lambda brought: None
        )
        self.collected = StepState()
        self.global_steps, self.total_training_steps = 0, 9
        self.rotation = BaseCheckpointManager.__new__(BaseCheckpointManager)
        self.rotation.previous_saved_paths = []
        self.ended: list[int] = []

    def on_step_end(self) -> None:
        self.ended.append(self.global_steps)

    on_sample_end = on_step_end

    def _save_checkpoint(self) -> None:
        root = Path(self.config.trainer.default_local_dir)
        folder, kept = root / f"global_step_{self.global_steps}", self.config.trainer.max_actor_ckpt_to_keep
        self.rotation.ensure_checkpoint_capacity(kept)
        (folder / "actor").mkdir(parents=True)
        if self.fails_at == "weights":
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        self.rotation.register_checkpoint(str(folder / "actor"), kept)
        self.whole_at_worst = [path for path in root.glob("global_step_*/actor") if (path.parent / "data.pt").exists()]
        (folder / "data.pt").touch()
        with (root / TRACKER).open("w") as file:
            if self.fails_at == "tracker":
                raise OSError(28, "No space left on device")
            file.write(str(self.global_steps))


class Run(CheckpointStage, Verl):  # pyright: ignore[reportIncompatibleMethodOverride]
    def step(self, number: int) -> None:
        self.global_steps = number
        self._save_checkpoint()
        self.on_step_end()


def whole(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/data.pt") if (path.parent / "actor").exists())


@pytest.mark.parametrize("fails_at", ["weights", "tracker"])
def test_what_cannot_be_written_ends_the_run_and_the_one_before_stays(fails_at: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(1)
    run.fails_at = fails_at
    with pytest.raises(
        RunEndedError, match=r"The checkpoint of step 2 .* GB were free: .*whole one is of step 1\. Make"
    ):
        run.step(2)
    assert whole(tmp_path) == ["global_step_1"]
    assert not (tmp_path / "global_step_2").exists()
    assert (tmp_path / TRACKER).read_text() == "1"


def test_a_folder_that_another_run_has_ends_this_one_before_it_reads_or_clears_anything(tmp_path: Path) -> None:
    lock = hold(tmp_path)  # on a file of its own, as another process would have it
    assert lock is not None
    with pytest.raises(
        RunEndedError, match=r"default_local_dir=.*: another run writes there at this moment; give this"
    ):
        Run(tmp_path)._init_dataloader()
    os.close(lock)


def test_the_first_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.fails_at = "weights"
    with pytest.raises(RunEndedError, match=r"unexpected pos 576 vs 534\. There is none before it\. Make room"):
        run.step(1)


@pytest.mark.parametrize("kept", [None, 1, 2])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(kept: int | None, tmp_path: Path) -> None:
    run = Run(tmp_path, max_actor_ckpt_to_keep=kept)
    for step in range(1, 5):
        run.step(step)
        assert run.config.trainer.max_actor_ckpt_to_keep == kept
        if step > 1:
            assert run.whole_at_worst, "verl had dropped the last one before the new one was complete"
    assert len(whole(tmp_path)) == (kept or 4)


def test_a_run_that_is_asked_to_stop_saves_once_and_makes_no_further_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step(1)
    assert run.total_training_steps == 9
    ask_to_stop(tmp_path)
    run.step(2)
    assert (run.total_training_steps, run.ended) == (2, [1, 2])
    run.global_steps = 3
    run.on_step_end()  # a step in which verl does not save
    assert whole(tmp_path) == ["global_step_1", "global_step_2", "global_step_3"]
    run._end_of_stop()
    assert not list(tmp_path.glob("stop*"))
