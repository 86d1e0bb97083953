"""The source `snapshot`: past weights, which were kept, sample prefixes in an engine of their own.

This is the paper's way, and the only one for the base model, the best model so far or another run's checkpoint.
"""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from recipe.soup.bank_origin import BY_LAG
from recipe.soup.prefixes.fit import POLICY, fit
from recipe.soup.prefixes.past_weights import PastWeightsSource, TakesSnapshots
from recipe.soup.prefixes.plan import PromptPlan
from recipe.soup.prefixes.prefix import Prefix, tokens_to_ask_for
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, SampledPrefix
from recipe.soup.prefixes.source import Fetch, RunFacts
from recipe.soup.settings import SoupSettings
from verl_ext.historical_policy.snapshots import Snapshot

COST = "cost/"
"""Begins the notes of a standalone engine's cost that no step has reported yet."""


class HistoricalEngine(TakesSnapshots, Protocol):
    """What the source needs from the trainer: `verl_ext.historical_policy` behind two calls."""

    def sample(self, snapshot: Snapshot, prompts: Sequence[Any], max_tokens: Sequence[int]) -> "Future[list[Any]]":
        """Sample one response to each prompt; it has `token_ids`, `log_probs` and the version that sampled them."""
        ...


class SnapshotSource(PastWeightsSource):
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
        super().__init__(settings, facts, fetch, engine, base_model, folder, lookahead=1 if settings.mixes else 0)
        self._engine = engine
        self._requests: list[PrefixRequest] = []
        self._sampling: Future[list[Any]] | None = None
        self._waited = 0.0

    def plan(self, ordinal: int, prompt: int) -> PromptPlan:
        # Prefixes are sampled a step ahead, whatever the age of the policy that samples them.
        return replace(super().plan(ordinal, prompt), steps_ahead=1)

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        return self._by_ordinal(chunk)

    def order(self, step: int, rows: list[PromptRequests]) -> None:
        """Let a standalone engine begin to sample the next step's prefixes."""
        if self.settings.snapshot.placement == "standalone":
            self._order(step)
            self._submit()

    def generated(self, step: int) -> None:
        """Let a colocated engine sample, for the prompts of the next step that no refill has taken."""
        super().generated(step)
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

    def metrics(self) -> dict[str, float]:
        waited, self._waited = self._waited, 0.0
        return {**super().metrics(), "soup/snapshots/waited_s": waited}

    def save(self, folder: Path) -> None:
        self._collect()
        self.store.notes |= {f"{COST}{name}": value for name, value in self._cost.items()}
        super().save(folder)

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._cost = {name: int(self.store.notes.get(f"{COST}{name}", 0)) for name in self._cost}

    def adapt(self, step: int, changed: Collection[str]) -> Counter[str]:
        """Drop also what another policy sampled: the bank holds the next step's prefixes, so that is all or nothing."""
        if any(name.removeprefix(f"{SoupSettings.path}.").startswith((*BY_LAG, "snapshot.policy")) for name in changed):
            return fit(self.bank, lambda prompt, slot, prefix: POLICY)
        return super().adapt(step, changed)
