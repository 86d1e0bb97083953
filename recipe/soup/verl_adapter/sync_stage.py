"""After a step: did the weights that it trained reach the engine?"""

from typing import Any

from verl.utils.debug import marked_timer

from recipe.soup.verl_adapter.step_state import Stage
from verl_ext.weight_arrivals import stale_weights


class SyncStage(Stage):
    """Every sync of weights at a step's end.

    Attributes:
        engines: verl's rollout replicas of the current policy that can be asked, once the run has begun.
    """

    engines: list[Any]
    _judged: dict[str, float]

    @property
    def _sends_differences(self) -> bool:
        """Whether weights go by verl's delta engine, past our note of what arrives."""
        return str(self.config.actor_rollout_ref.rollout.checkpoint_engine.backend).startswith("delta")

    def on_step_end(self) -> None:
        super().on_step_end()
        # Without a gradient or a learning rate the weights may stay the same, and so may those of the engine.
        with marked_timer("check_weights", self.timing_raw):
            stale = stale_weights(self.engines) if self.broken.trained and not self._sends_differences else None
        self._judged = self.broken.after_sync(self.global_steps, stale)

    def _consume_sync_metrics(self) -> dict:
        """Metrics of the sync; verl joins them to the step's."""
        return super()._consume_sync_metrics() | self._judged
