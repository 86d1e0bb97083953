"""Steps that trained nothing, or not what they seem to have: told in one sentence, and the run's end if not allowed.

verl's engines skip the optimizer's step where the gradient is not finite, and go on. Both drivers ask here.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch

from verl_ext.health import NOTICE, end_run

KEY = "algorithm.soup.broken_steps"
NO_TOKENS = "soup/train/broken/no_tokens"
NO_UPDATE = "soup/train/broken/no_update"
OLD_WEIGHTS = "soup/train/broken/old_weights"
"""Metrics, 1 or 0: no token had a loss; the optimizer's step was skipped; the engine kept the weights of before."""
SCALES = 16
"""torch's gradient scaler begins at 2**16, and halves it in each step that overflows."""


class BrokenSteps:
    """Judges each step; all that judge return their metric.

    Args:
        answer: what happens at a broken step: `stop` ends the run (`RunEndedError`), `warn` tells of each kind once.
        scales: whether the trainer computes in float16, whose gradient scaler looks for its scale by overflows.

    Attributes:
        trained: whether the last update must have changed the weights, as far as gradient and learning rate tell.
    """

    def __init__(self, answer: Literal["stop", "warn"], scales: bool = False) -> None:
        self._answer, self._patience = answer, SCALES if scales else 0
        self._told: set[str] = set()
        self._overflows = 0
        self._lr = 0.0
        self.trained = False

    def before_update(self, step: int, counts: torch.Tensor) -> dict[str, float]:
        """Judge what is to be trained on.

        Args:
            counts: (batch, response_length), not 0 where a token counts in the loss.
        """
        self.trained = False
        return self._find(
            NO_TOKENS,
            not bool(counts.any()),
            f"In step {step} no token has a loss: algorithm.rollout_correction or algorithm.soup.loss_tokens mask all "
            "of them, or only padding is left. Loosen what masks them.",
        )

    def after_update(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Judge what the update told.

        Args:
            metrics: the step's, means over mini-batches: one that is not finite shows in them.
        """
        told = {name: float(value) for name, value in metrics.items() if name.startswith(("actor/", "critic/"))}
        norm = told.get("actor/grad_norm", 0.0)
        # An engine reports the learning rate of the step to come.
        self.trained = math.isfinite(norm) and norm > 0 and self._lr > 0
        self._lr = told.get("actor/lr", 0.0)
        wrong = {n: v for n, v in told.items() if n.endswith(("loss", "grad_norm")) and not math.isfinite(v)}
        self._overflows = self._overflows + 1 if wrong else 0
        expected = self._overflows <= self._patience and all(name.endswith("grad_norm") for name in wrong)
        values = ", ".join(f"{name}={value:g}" for name, value in wrong.items())
        return self._find(
            NO_UPDATE,
            bool(wrong) and not expected,
            f"In step {step} the weights were not updated, or not by every mini-batch, since {values}: look for what "
            "grows or is not finite in the metrics of earlier steps; a lower actor_rollout_ref.actor.optim.lr or more "
            "precision may help.",
        )

    def after_sync(self, step: int, stale: str | None) -> dict[str, float]:
        """Judge whether the engine has the weights that were trained.

        Args:
            stale: what speaks against it, if anything does.
        """
        return self._find(
            OLD_WEIGHTS,
            stale is not None,
            f"After step {step}, whose update had a gradient, {stale}: the engine goes on with the policy of an "
            "earlier step, which looks like staleness. See what the trainer sends: adapters that are left out "
            "(actor_rollout_ref.model.lora_rank), or weights in a type too coarse for the learning rate "
            "(actor_rollout_ref.actor.fsdp_config.model_dtype).",
        )

    def _find(self, metric: str, broken: bool, sentence: str) -> dict[str, float]:
        if broken and self._answer == "stop":
            end_run(f"{sentence} {KEY}=warn goes on all the same.")
        if broken and metric not in self._told:
            self._told.add(metric)
            print(f"{NOTICE}{sentence} The run goes on ({KEY}=warn); {metric} counts such steps.", flush=True)
        return {metric: float(broken)}
