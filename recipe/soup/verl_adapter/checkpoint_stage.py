"""Checkpoints: prefixes beside weights, saved whole or not at all; and the places that a run has to itself."""

import shutil
from pathlib import Path

import transfer_queue as tq
from ray.exceptions import RayActorError

from recipe.soup.prefixes.past_weights import SNAPSHOT_FOLDER
from recipe.soup.prefixes.resume import resume
from recipe.soup.records.earlier_runs import TRACKER, hold_all, put_aside, started_anew
from recipe.soup.verl_adapter.lost_samples import LostSamples
from recipe.soup.verl_adapter.step_state import Stage
from verl_ext.failures import in_a_line
from verl_ext.health import NOTICE, end_run
from verl_ext.stop_request import request_file

GB = 1e9


class CheckpointStage(Stage):
    """Every save, the resume, and the end of a run that is asked to stop.

    Attributes:
        lost: counts the samples that never come.
    """

    lost: LostSamples
    _saved = 0
    """The step of the last checkpoint that this run has saved."""

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.trainer.default_local_dir)

    def _folder(self, step: int) -> Path:
        return self._checkpoints / f"global_step_{step}"

    def _save_checkpoint(self) -> None:
        folder, tracker = self._folder(self.global_steps), self._checkpoints / TRACKER
        before = tracker.read_text() if tracker.exists() else ""
        # What groups brought that were dropped since the last update; the rest is in verl's queue, which is saved.
        self.source.harvest(self.collected.prefixes)
        self.collected.prefixes = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Before verl's part, which ends by declaring the checkpoint complete.
            self.source.save(folder)
            self._save_weights()
        except RayActorError:
            raise  # a process died, which is told elsewhere
        except Exception as error:
            free = shutil.disk_usage(self._checkpoints).free / GB
            shutil.rmtree(folder, ignore_errors=True)  # a part of a checkpoint, and room for the line below
            if before:
                tracker.write_text(before)  # which verl empties before it writes
            goes_on = f"The last whole one is of step {before}" if before else "There is none before it"
            end_run(
                f"The checkpoint of step {self.global_steps} could not be written to {self._checkpoints}, where "
                f"{free:.2g} GB were free: {in_a_line(error)}. {goes_on}. Make room, save less often "
                "(trainer.save_freq), or keep fewer (trainer.max_actor_ckpt_to_keep)."
            )
        self._saved = self.global_steps
        for outlived in self._checkpoints.glob(f"global_step_*/{SNAPSHOT_FOLDER}"):
            if not (outlived.parent / "actor").exists():  # verl keeps `max_actor_ckpt_to_keep`
                shutil.rmtree(outlived)

    def _save_weights(self) -> None:
        """verl's part. Where one checkpoint is kept, verl drops it before the new one is complete; here, after."""
        trainer = self.config.trainer
        kept = trainer.max_actor_ckpt_to_keep
        try:
            trainer.max_actor_ckpt_to_keep = 2 if kept == 1 else kept
            super()._save_checkpoint()
        finally:
            trainer.max_actor_ckpt_to_keep = kept
        if kept == 1 and self._saved:
            shutil.rmtree(self._folder(self._saved) / "actor", ignore_errors=True)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps == 0 and (said := put_aside(started_anew(self.config))):
            print(f"{NOTICE}{said}", flush=True)
        if self.global_steps == 0:
            return
        if self.trainer_mode != "sync":
            self.lost.resume((tq.kv_list("train") or {}).get("train", {}))
        folder = self._folder(self.global_steps)
        if self.config.trainer.resume_mode == "resume_path":
            folder = Path(self.config.trainer.resume_from_path)
        resume(self.source, folder, self.global_steps)

    def _init_dataloader(self) -> None:
        # Before a source of prefixes clears what it will write over.
        try:
            hold_all(self.config)
        except SystemExit as refusal:
            end_run(str(refusal))
        super()._init_dataloader()

    # ------------------------------------------------------------------ asked to stop

    def on_step_end(self) -> None:
        # verl has saved by now if it saves in this step.
        if self.settings.sigterm_grace and request_file(self._checkpoints).exists():
            if self._saved < self.global_steps:
                self._save_checkpoint()
            self.total_training_steps = self.global_steps  # verl's loop looks there before each step
            print(f"{NOTICE}asked to stop: step {self.global_steps} is the last, and is saved.", flush=True)
        super().on_step_end()

    def _end_of_stop(self) -> None:
        """Tell whoever asked that the run has ended, however it did."""
        if self.settings.sigterm_grace:
            request_file(self._checkpoints).unlink(missing_ok=True)
