"""What the trainer collects in one step or one validation, in one object that its stages share."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from recipe.soup.algorithm.batch import TrainRows
from recipe.soup.names import SAMPLED_KEY
from recipe.soup.prefixes.requests import SampledPrefix
from recipe.soup.prefixes.source import PrefixSource
from recipe.soup.settings import SoupSettings
from recipe.soup.verl_adapter.broken_steps import BrokenSteps
from recipe.soup.verl_adapter.marked_samples import Shown


@dataclass
class Surprise:
    """Of a validation's sampled tokens: the sum of their -log-probs, in nats, and their number."""

    nats: float = 0.0
    tokens: int = 0


@dataclass
class StepState:
    """What is collected while a step's samples come in, and used before its weights are updated.

    Attributes:
        prefixes: those that samples brought back for later steps.
        rows: the batch, from its old log-probs on.
        evicted_tokens: sampled for groups that are never trained on, which verl filters out or has too many of.
        all_rows, loss_sums, told: of each of the step's updates its rows, the sums of its loss, and our metrics.
        shown: mixed samples of the last step, for the trackers; they wait for the next validation.
        surprise: of the last validation, or the one that runs.
    """

    prefixes: list[SampledPrefix] = field(default_factory=list)
    rows: TrainRows | None = None
    evicted_tokens: int = 0
    all_rows: list[TrainRows] = field(default_factory=list)
    loss_sums: list[dict[str, float]] = field(default_factory=list)
    told: list[dict[str, float]] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    surprise: Surprise = field(default_factory=Surprise)

    def add_prefixes(self, extra_fields: Iterable[Any], tags: Iterable[dict]) -> None:
        """Unpack what samples brought back; verl's padding rows repeat the first sample's extra fields."""
        for extra, tag in zip(extra_fields, tags, strict=True):
            if not tag.get("is_padding", False):
                self.prefixes += map(SampledPrefix.unpack, getattr(extra, "data", extra)[SAMPLED_KEY])

    def clear(self) -> None:
        """Drop what an update has used."""
        self.prefixes = []
        self.rows = None
        self.evicted_tokens = 0


class Stage(PPOTrainer):
    """A part of the trainer; `trainer.SoupStages` makes what they share.

    Attributes:
        settings: `algorithm.soup`.
        source: where prefixes come from.
        collected: what is known of the step so far.
        broken: judges whether a step trained what it seems to have.
    """

    settings: SoupSettings
    source: PrefixSource
    collected: StepState
    broken: BrokenSteps
