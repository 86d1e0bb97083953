"""The source `snapshot` with `placement=shared`: past versions as LoRA adapters in the current policy's own engine.

A prefix is sampled just before its sample goes on with the current policy: no second engine, no queue, no bank.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from recipe.soup.prefixes.past_weights import PastWeightsSource, TakesSnapshots
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.requests import PrefixRequest, SampledPrefix
from recipe.soup.prefixes.source import Fetch, RunFacts
from recipe.soup.settings import SoupSettings
from verl_ext.health import end_run
from verl_ext.historical_policy.snapshots import Snapshot


class AdapterEngine(TakesSnapshots, Protocol):
    """What the source needs from the trainer."""

    @property
    def at_once(self) -> int:
        """Different past versions that may sample in one step."""
        ...

    def fault(self) -> str | None:
        """Say which adapter was missing in a request, if one was."""
        ...


class SharedSource(PastWeightsSource):
    """Has past versions sample in the step that uses their prefixes.

    With `pool` each prompt has a version of its own, of those that were drawn for the step; else a step has one.
    A refill of filtered groups is mixed like any other prompts.

    Args:
        engine: see `AdapterEngine`.
        zero: folder of version 0, an adapter that changes nothing.
        folder: of the others.
    """

    def __init__(
        self, settings: SoupSettings, facts: RunFacts, fetch: Fetch, engine: AdapterEngine, zero: str, folder: Path
    ) -> None:
        super().__init__(settings, facts, fetch, engine, zero, folder, lookahead=0)
        self._engine = engine

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        return [{} for _ in chunk.messages]

    def late(self, chunk: Chunk, step: int) -> list[dict[int, PrefixRequest]]:
        rows: list[dict[int, PrefixRequest]] = []
        for row in range(chunk.size):
            snapshot, request = self._of_prompt(chunk.first_ordinal + row, step), self._missing(chunk, row)
            if request is None or snapshot is None or snapshot.version >= step - 1:
                rows.append({})
                continue
            oldest = self.settings.max_age
            if oldest is not None and step - 1 - snapshot.version > oldest:
                self._cost["too_old"] += len(request.lengths)
                rows.append({})
                continue
            self._served = snapshot
            rows.append(
                {
                    slot: replace(request, lengths={slot: length}, adapter=snapshot.adapter)
                    for slot, length in request.lengths.items()
                }
            )
            self._cost["requests"] += len(request.lengths) * request.candidates
        return rows

    def _of_prompt(self, ordinal: int, step: int) -> Snapshot | None:
        if self.settings.snapshot.policy != "pool":
            return self._choose(step)
        drawn = self._drawn(step, self._engine.at_once)
        return drawn[int(np.random.default_rng([self.facts.seed, ordinal, 4]).integers(len(drawn)))]

    def generated(self, step: int) -> None:
        """End the run if an adapter was missing: samples of the wrong policy, or none, came of it."""
        super().generated(step)
        if (why := self._engine.fault()) is not None:
            end_run(f"In step {step} {why}.")

    def harvest(self, arrived: Iterable[SampledPrefix]) -> None:
        """Count them; their samples have them already."""
        for sampled in arrived:
            self._count(sampled)
