"""What both sources of past weights share: which versions are kept, and which one a step gets prefixes of."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from recipe.soup.prefixes.queue import target_version
from recipe.soup.prefixes.schedules import lag_at
from recipe.soup.prefixes.source import Fetch, PrefixSource, RunFacts
from recipe.soup.settings import BY_AGE, SoupSettings
from verl_ext.historical_policy.snapshots import FOREIGN, Snapshot, from_checkpoint
from verl_ext.historical_policy.store import SnapshotStore

SNAPSHOT_FOLDER = "soup_snapshots"
BEST = "best"
AWAITED = "best awaited"
"""The note of a version, above 0, that is the best so far and whose weights are still to be taken."""


class TakesSnapshots(Protocol):
    """What keeping needs from the trainer."""

    def take_snapshot(self, version: int) -> Snapshot:
        """Write the trainer's current weights."""
        ...


class PastWeightsSource(PrefixSource):
    """Keeps versions, and chooses one.

    Args:
        engine: see `TakesSnapshots`.
        base_model: folder or name of version 0.
        folder: where snapshot files go, if they go into files.
        lookahead: number of steps for which prompts are fetched ahead of time.
    """

    def __init__(
        self,
        settings: SoupSettings,
        facts: RunFacts,
        fetch: Fetch,
        engine: TakesSnapshots,
        base_model: str,
        folder: Path | None,
        lookahead: int,
    ) -> None:
        super().__init__(settings, facts, fetch, lookahead)
        self._trainer = engine
        assert settings.snapshot.keep is not None
        self.store = SnapshotStore(settings.snapshot.keep, settings.snapshot.eviction, folder)
        self._base = from_checkpoint(base_model, version=0)
        policy = settings.snapshot.policy
        choices: dict[str, Callable[[int], Snapshot | None]] = {
            "lagged": self._lagged,
            "pool": self._pool,
            "base": lambda step: self._base,
            "best": lambda step: self.store.named.get(BEST, self._base),
        }
        foreign = None if policy in choices else from_checkpoint(policy, FOREIGN)
        self._choose: Callable[[int], Snapshot | None] = choices.get(policy, lambda step: foreign)
        self._served: Snapshot | None = None

    def _lagged(self, step: int) -> Snapshot | None:
        rng = np.random.default_rng([self.facts.seed, step, 3])
        lag = lag_at(self.settings, step, self.facts.last_step, rng)
        version = target_version(step, lag, self.settings.warm_start)
        if version is None:
            return None
        if (found := self.store.youngest(version)) is not None:
            return found
        if version < self.settings.snapshot.every:  # no snapshot can be that old yet
            return self._base
        # The run went on from a checkpoint without any, or of a shorter lag: the oldest one grows to the lag.
        kept = self.store.versions if self.settings.warm_start != "pure" else []
        return self.store[kept[0]] if kept else None

    def _pool(self, step: int) -> Snapshot | None:
        return self._drawn(step, 1)[0]

    def _drawn(self, step: int, count: int) -> list[Snapshot]:
        """Draw at most so many versions of those kept."""
        versions = [version for version in self.store.versions if version < step - 1] or [0]
        rng = np.random.default_rng([self.facts.seed, step, 2])
        drawn = rng.choice(versions, size=min(count, len(versions)), replace=False)
        return [self.store[version] if version else self._base for version in map(int, drawn)]

    def updated(self, step: int) -> None:
        """Keep every `every`-th version that a later step may use."""
        by_age = self.settings.snapshot.policy in BY_AGE
        if self.mixes and by_age and step % self.settings.snapshot.every == 0 and step < self.facts.last_step:
            self.store.add(self._trainer.take_snapshot(step))

    def validated(self, step: int, score: float) -> None:
        """Remember the best score; its weights are taken when the rollout engine sleeps, before the next update."""
        if self.mixes and self.settings.snapshot.policy == BEST and score > self.store.notes.get(BEST, -np.inf):
            self.store.notes |= {BEST: score, AWAITED: step}

    def generated(self, step: int) -> None:
        """Take the weights of the best version so far, which are still there."""
        if self.store.notes.pop(AWAITED, 0):
            self.store.name(BEST, self._trainer.take_snapshot(step - 1))

    def metrics(self) -> dict[str, float]:
        return {
            **super().metrics(),
            "soup/snapshots/kept": len({*self.store.versions, *(s.version for s in self.store.named.values())}),
            "soup/snapshots/bytes": self.store.nbytes,
            "soup/snapshots/next_version": FOREIGN if self._served is None else self._served.version,
        }

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.store.save(folder / SNAPSHOT_FOLDER)

    def load(self, folder: Path) -> None:
        super().load(folder)
        if (folder / SNAPSHOT_FOLDER).exists():  # the checkpoint of a run that mixed nothing has none
            self.store.load(folder / SNAPSHOT_FOLDER)
