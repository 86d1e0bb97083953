"""A run that is asked to stop ends after its step, with a checkpoint (`sigterm_grace`)."""

from recipe.soup.verl_adapter.step_state import Stage
from verl_ext.health import NOTICE
from verl_ext.stop_request import request_file


class StopStage(Stage):
    """Every end of a step, right after verl has saved if it saves in this one."""

    _saved = 0

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        self._saved = self.global_steps

    def on_step_end(self) -> None:
        if self.settings.sigterm_grace and request_file(self.config.trainer.default_local_dir).exists():
            if self._saved < self.global_steps:
                self._save_checkpoint()
            self.total_training_steps = self.global_steps  # verl's loop looks there before each step
            print(f"{NOTICE}asked to stop: step {self.global_steps} is the last, and is saved.", flush=True)
        super().on_step_end()

    def _end_of_stop(self) -> None:
        """Tell whoever asked that the run has ended, however it did."""
        if self.settings.sigterm_grace:
            request_file(self.config.trainer.default_local_dir).unlink(missing_ok=True)
