"""The source `lookahead`: prefixes that today's policy samples for prompts of later steps. Imports no verl.

A prompt that will be trained on `lag` updates from now is continued today with today's weights; when its turn comes,
those tokens *are* a sample of the policy of `lag` updates ago. The data order is known ahead, so this is exact.
"""

from itertools import cycle, product

from recipe.soup.orders import PromptOrders, SeedOrder
from recipe.soup.prefixes import Prefix
from recipe.soup.settings import SoupSettings
from recipe.soup.sources.base import Fetch, PrefixSource, RunFacts
from recipe.soup.sources.queue import Chunk


class LookaheadSource(PrefixSource):
    """Prefixes that were sampled `lag` updates before their prompt is trained on, by the current policy's engine."""

    def __init__(self, settings: SoupSettings, facts: RunFacts, fetch: Fetch) -> None:
        lag = settings.lag if settings.mixes else 0
        super().__init__(settings, facts, fetch, lag, settings.warm_start)

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        prefixes = super()._prefixes(chunk, step)
        # A refill may come upon prompts of a later step: too early for `pure`.
        return prefixes if self.queue.mixes(step) else [{} for _ in prefixes]

    def order(self, step: int, rows: list[PromptOrders]) -> None:
        """Spread the prefixes that are due over the samples of this step's prompts, one future prompt to a sample."""
        self.queue.top_up(step, self._next_chunk)
        hosts = cycle(product(range(self.facts.samples), rows))
        for chunk, row in self.queue.due(step):
            ordinal = chunk.first_ordinal + row
            present = self.bank.slots(ordinal)
            missing = {slot: n for slot, n in enumerate(chunk.lengths[row]) if slot not in present}
            if missing:
                sample, orders = next(hosts)
                order = SeedOrder(ordinal, chunk.messages[row], missing, self.settings.on_eos)
                orders.seeds.setdefault(sample, []).append(order)
                self._cost["requests"] += len(missing)
