"""The source `lookahead`: today's policy samples prefixes for prompts of later steps.

A prompt that will be trained on `lag` updates from now is continued today, with today's weights. When its turn comes,
these tokens *are* a sample of the policy of `lag` updates ago. The order of the data is known ahead, so this is exact.
"""

from itertools import cycle, product

from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.requests import PromptRequests
from recipe.soup.prefixes.source import Fetch, PrefixSource, RunFacts
from recipe.soup.settings import SoupSettings


class LookaheadSource(PrefixSource):
    """Has prefixes sampled `lag` updates before their prompt is trained on, by the engine of the current policy."""

    def __init__(self, settings: SoupSettings, facts: RunFacts, fetch: Fetch) -> None:
        reach = settings.largest_lag if settings.mixes else 0
        super().__init__(settings, facts, fetch, reach, settings.warm_start)

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        prefixes = self._by_ordinal(chunk)
        # A refill may reach prompts of a later step, which is too early for `pure`.
        mixed = [self.queue.version(plan, step) is not None for plan in chunk.plans]
        return [slots if mixes else {} for slots, mixes in zip(prefixes, mixed, strict=True)]

    def order(self, step: int, rows: list[PromptRequests]) -> None:
        """Spread the requests that are due over the samples of this step's prompts, one future prompt to a sample."""
        self.queue.top_up(step, self._next_chunk)
        hosts = cycle(product(range(self.facts.samples), rows))
        for chunk, row in self.queue.due(step):
            if (request := self._missing(chunk, row)) is not None:
                sample, host = next(hosts)
                host.requests.setdefault(sample, []).append(request)
                self._cost["requests"] += len(request.lengths) * request.candidates
                self.in_flight |= {(request.ordinal, slot) for slot in request.lengths}
