"""The source `lookahead`: prefixes that today's policy samples for prompts of later steps.

A prompt that will be trained on `lag` updates from now is continued today with today's weights; when its turn comes,
those tokens *are* a sample of the policy of `lag` updates ago. The data order is known ahead, so this is exact.
"""

from itertools import cycle, product

from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.requests import PromptRequests
from recipe.soup.prefixes.source import Fetch, PrefixSource, RunFacts
from recipe.soup.settings import SoupSettings


class LookaheadSource(PrefixSource):
    """Prefixes that were sampled `lag` updates before their prompt is trained on, by the current policy's engine."""

    def __init__(self, settings: SoupSettings, facts: RunFacts, fetch: Fetch) -> None:
        reach = settings.largest_lag if settings.mixes else 0
        super().__init__(settings, facts, fetch, reach, settings.warm_start)

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        prefixes = super()._prefixes(chunk, step)
        # A refill may come upon prompts of a later step: too early for `pure`.
        mixed = [self.queue.version(plan, step) is not None for plan in chunk.plans]
        return [slots if mixes else {} for slots, mixes in zip(prefixes, mixed, strict=True)]

    def order(self, step: int, rows: list[PromptRequests]) -> None:
        """Spread the prefixes that are due over the samples of this step's prompts, one future prompt to a sample."""
        self.queue.top_up(step, self._next_chunk)
        hosts = cycle(product(range(self.facts.samples), rows))
        for chunk, row in self.queue.due(step):
            if (order := self._missing(chunk, row)) is not None:
                sample, orders = next(hosts)
                orders.seeds.setdefault(sample, []).append(order)
                self._cost["requests"] += len(order.lengths) * order.candidates
                self.in_flight |= {(order.ordinal, slot) for slot in order.lengths}
