"""The source `snapshot`: past weights, which were kept, sample prefixes in an engine of their own.

This is the paper's way, and the only one for the base model, the best model so far or another run's checkpoint.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recipe.soup.bank_origin import BY_LAG
from recipe.soup.prefixes.fit import POLICY, fit
from recipe.soup.prefixes.plan import PromptPlan
from recipe.soup.prefixes.prefix import Prefix, tokens_to_ask_for
from recipe.soup.prefixes.queue import Chunk, target_version
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, SampledPrefix
from recipe.soup.prefixes.schedules import lag_at
from recipe.soup.prefixes.source import Fetch, PrefixSource, RunFacts
from recipe.soup.settings import BY_AGE, SoupSettings
from verl_ext.historical_policy.snapshots import FOREIGN, Snapshot, from_checkpoint
from verl_ext.historical_policy.store import SnapshotStore

SNAPSHOT_FOLDER = "soup_snapshots"
BEST = "best"
AWAITED = "best awaited"
"""The note of a version, above 0, that is the best so far and whose weights are still to be taken."""
COST = "cost/"
"""Begins the notes of a standalone engine's cost that no step has reported yet."""


class HistoricalEngine(Protocol):
    """What the source needs from the trainer: `verl_ext.historical_policy` behind two calls."""

    def take_snapshot(self, version: int) -> Snapshot:
        """Write the trainer's current weights."""
        ...

    def sample(self, snapshot: Snapshot, prompts: Sequence[Any], max_tokens: Sequence[int]) -> "Future[list[Any]]":
        """Sample one response to each prompt; it has `token_ids`, `log_probs` and the version that sampled them."""
        ...


class SnapshotSource(PrefixSource):
    """Has one past version in each step sample the prefixes for the next step.

    A standalone engine samples while this step generates and trains; a colocated one between the two, when the current
    policy's engine has gone to sleep. A refill of filtered groups takes prompts of the next step: with a standalone
    engine it waits for their prefixes, with a colocated one it is not mixed.

    Args:
        engine: see `HistoricalEngine`.
        base_model: folder or name of version 0.
        folder: where snapshot files go with `storage=disk`.
    """

    def __init__(
        self,
        settings: SoupSettings,
        facts: RunFacts,
        fetch: Fetch,
        engine: HistoricalEngine,
        base_model: str,
        folder: Path | None,
    ) -> None:
        super().__init__(settings, facts, fetch, lookahead=1 if settings.mixes else 0)
        self._engine = engine
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
        self._requests: list[PrefixRequest] = []
        self._served: Snapshot | None = None
        self._sampling: Future[list[Any]] | None = None
        self._waited = 0.0

    def plan(self, ordinal: int, prompt: int) -> PromptPlan:
        # Prefixes are sampled a step ahead, whatever the age of the policy that samples them.
        return replace(super().plan(ordinal, prompt), steps_ahead=1)

    # ------------------------------------------------------------------ which policy

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
        versions = [version for version in self.store.versions if version < step - 1] or [0]
        version = int(np.random.default_rng([self.facts.seed, step, 2]).choice(versions))
        return self.store[version] if version else self._base

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        return self._by_ordinal(chunk)

    def updated(self, step: int) -> None:
        """Keep every `every`-th version that a later step may use."""
        by_age = self.settings.snapshot.policy in BY_AGE
        if self.mixes and by_age and step % self.settings.snapshot.every == 0 and step < self.facts.last_step:
            self.store.add(self._engine.take_snapshot(step))

    def validated(self, step: int, score: float) -> None:
        """Remember the best score; its weights are taken when the rollout engine sleeps, before the next update."""
        if self.mixes and self.settings.snapshot.policy == BEST and score > self.store.notes.get(BEST, -np.inf):
            self.store.notes |= {BEST: score, AWAITED: step}

    # ------------------------------------------------------------------ its prefixes

    def order(self, step: int, rows: list[PromptRequests]) -> None:
        """Let a standalone engine begin to sample the next step's prefixes."""
        if self.settings.snapshot.placement == "standalone":
            self._order(step)
            self._submit()

    def generated(self, step: int) -> None:
        """Let a colocated engine sample, for the prompts of the next step that no refill has taken."""
        if self.store.notes.pop(AWAITED, 0):
            self.store.name(BEST, self._engine.take_snapshot(step - 1))
        if self.settings.snapshot.placement == "colocated":
            self._order(step)
            self._submit()
            self._collect()

    def _order(self, step: int) -> None:
        """Choose the next step's historical policy, and note which prefixes it shall sample."""
        self.queue.top_up(step, self._next_chunk)
        snapshot = self._choose(step + 1)
        if snapshot is None or snapshot.version >= step:
            return
        self._served = snapshot
        self.store.hold(snapshot)
        for chunk, row in self.queue.due(step):
            if (request := self._missing(chunk, row)) is not None:
                self._requests.append(request)

    def _submit(self) -> None:
        if self._requests and self._served is not None:
            wanted = [
                (request.messages, length)
                for request in self._requests
                for length in request.lengths.values()
                for _ in range(request.candidates)
            ]
            prompts = [messages for messages, _ in wanted]
            tokens = [tokens_to_ask_for(length, self.facts.response_length) for _, length in wanted]
            self._sampling = self._engine.sample(self._served, prompts, tokens)

    def _collect(self) -> None:
        """Wait for the prefixes that are being sampled, and put them into the bank."""
        if self._sampling is None:
            return
        started = time.perf_counter()
        answers = iter(self._sampling.result())
        self._waited += time.perf_counter() - started
        requests, self._requests, self._sampling = self._requests, [], None
        # Counted when the answers arrive; those of a standalone engine arrive a step after they were requested.
        self._cost["requests"] += sum(len(request.lengths) * request.candidates for request in requests)
        self.harvest(
            SampledPrefix.from_answers(request, slot, length, arrived)
            for request in requests
            for slot, length in request.lengths.items()
            if (arrived := [answer for answer in islice(answers, request.candidates) if answer is not None])
        )

    def take(self, step: int) -> tuple[Chunk, list[dict[int, Prefix]]]:
        self._collect()
        return super().take(step)

    # ------------------------------------------------------------------ the rest

    def metrics(self) -> dict[str, float]:
        waited, self._waited = self._waited, 0.0
        return {
            **super().metrics(),
            "soup/snapshots/kept": len({*self.store.versions, *(s.version for s in self.store.named.values())}),
            "soup/snapshots/bytes": self.store.nbytes,
            "soup/snapshots/next_version": FOREIGN if self._served is None else self._served.version,
            "soup/snapshots/waited_s": waited,
        }

    def save(self, folder: Path) -> None:
        self._collect()
        super().save(folder)
        self.store.notes |= {f"{COST}{name}": value for name, value in self._cost.items()}
        self.store.save(folder / SNAPSHOT_FOLDER)

    def load(self, folder: Path) -> None:
        super().load(folder)
        if (folder / SNAPSHOT_FOLDER).exists():  # the checkpoint of a run that mixed nothing has none
            self.store.load(folder / SNAPSHOT_FOLDER)
            self._cost = {name: int(self.store.notes.get(f"{COST}{name}", 0)) for name in self._cost}

    def adapt(self, step: int, changed: Collection[str]) -> Counter[str]:
        """Drop also what another policy sampled: the bank holds the next step's prefixes, so that is all or nothing."""
        if any(name.removeprefix(f"{SoupSettings.path}.").startswith((*BY_LAG, "snapshot.policy")) for name in changed):
            return fit(self.bank, lambda prompt, slot, prefix: POLICY)
        return super().adapt(step, changed)
