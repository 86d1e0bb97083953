"""The prefix source `lookahead`: fetches prompts ahead of time, orders their prefixes, keeps and hands them out.

Imports no verl. The trainer calls, in each step: `take` for each chunk that it trains on, `order_seeds` once, and
`harvest` for what the samples bring back.
"""

import zlib
from collections.abc import Callable, Iterable
from itertools import cycle, product
from pathlib import Path
from typing import Any

from recipe.soup.lookahead import Chunk, LookaheadQueue
from recipe.soup.orders import PromptOrders, Seed, SeedOrder
from recipe.soup.prefixes import Prefix, PrefixBank, plan_lengths
from recipe.soup.settings import SoupSettings

Fetch = Callable[[], tuple[Any, list[Any], Any]]
"""Reads prompts from the dataloader: the batch, its chat messages, and the dataloader's state before it."""


class LookaheadSource:
    """Prefixes that were sampled `lag` updates before their prompt is trained on.

    Args:
        settings: `algorithm.soup`.
        samples: `rollout.n`.
        seed: of the drawn lengths.
        prompts_per_step: `data.train_batch_size`.
        last_step: the run's last step.
        fetch: reads the next prompts.
    """

    def __init__(
        self, settings: SoupSettings, samples: int, seed: int, prompts_per_step: int, last_step: int, fetch: Fetch
    ) -> None:
        self.settings, self.samples, self.seed = settings, samples, seed
        self._fetch = fetch
        lag = settings.lag if settings.mixed_share > 0 else 0
        self.queue = LookaheadQueue(lag, settings.warm_start, prompts_per_step, last_step)
        self.bank = PrefixBank()
        self._next_ordinal = 0
        self._expected: dict[int, int] = {}
        self._cost = self._no_cost()

    @staticmethod
    def _no_cost() -> dict[str, int]:
        return dict.fromkeys(("requests", "arrived", "tokens", "ended"), 0)

    def lengths(self, ordinal: int) -> list[int]:
        """Prefix lengths of the prompt at this place in the data, one for each of its mixed samples."""
        settings = self.settings
        return plan_lengths(settings.prefix_length, settings.mixed_share, self.samples, self.seed, ordinal)

    def _next_chunk(self) -> Chunk:
        batch, messages, state = self._fetch()
        ordinals = range(self._next_ordinal, self._next_ordinal + len(messages))
        for ordinal, message in zip(ordinals, messages, strict=True):
            if self._expected.pop(ordinal, None) not in (None, _fingerprint(message)):
                raise RuntimeError(
                    f"Prompt {ordinal} of the resumed run is not the one that the checkpoint holds prefixes for: keep "
                    "data.train_files, data.seed and data.shuffle, or start anew with trainer.resume_mode=disable."
                )
        self._next_ordinal += len(messages)
        return Chunk(batch, ordinals.start, messages, [self.lengths(ordinal) for ordinal in ordinals], state)

    def take(self, step: int) -> tuple[Chunk, list[dict[int, Prefix]]]:
        """The prompts that come next, and for each its prefixes by slot."""
        chunk = self.queue.pop() or self._next_chunk()
        prefixes = [self.bank.take(chunk.first_ordinal + row) for row in range(chunk.size)]
        # A refill may come upon prompts of a later step: too early for `pure`, or seeded in this very step.
        mixes = self.queue.mixes(step)
        return chunk, [{s: p for s, p in slots.items() if mixes and p.version < step - 1} for slots in prefixes]

    def order_seeds(self, step: int, rows: list[PromptOrders]) -> None:
        """Spread the prefixes that are due over the samples of this step's prompts, one future prompt to a sample."""
        self.queue.top_up(step, self._next_chunk)
        hosts = cycle(product(range(self.samples), rows))
        for chunk, row in self.queue.due(step):
            ordinal = chunk.first_ordinal + row
            present = self.bank.slots(ordinal)
            missing = {slot: n for slot, n in enumerate(chunk.lengths[row]) if slot not in present}
            if missing:
                sample, orders = next(hosts)
                order = SeedOrder(ordinal, chunk.messages[row], missing, self.settings.on_eos)
                orders.seeds.setdefault(sample, []).append(order)
                self._cost["requests"] += len(missing)

    def harvest(self, seeds: Iterable[Seed]) -> None:
        """Keep the prefixes whose prompts are still to come."""
        front = self.queue.front
        for seed in seeds:
            self._cost["arrived"] += 1
            self._cost["tokens"] += seed.sampled
            self._cost["ended"] += seed.ended
            if front is not None and seed.ordinal >= front.first_ordinal:
                self.bank.put(seed.ordinal, seed.slot, seed.prefix)

    def metrics(self) -> dict[str, float]:
        """Cost since the last call, in requests and tokens, and what is kept."""
        cost, self._cost = self._cost, self._no_cost()
        return {
            "soup/cost/seed_requests": cost["requests"],
            "soup/cost/seed_tokens": cost["tokens"],
            "soup/cost/seeds_lost": cost["requests"] - cost["arrived"],
            "soup/cost/seeds_ended": cost["ended"],
            "soup/bank/prefixes": len(self.bank),
            "soup/bank/bytes": self.bank.nbytes,
            "soup/queue/prompts": len(self.queue),
        }

    def resume_state(self, now: Callable[[], Any]) -> Any:
        """The dataloader's state at the first prompt that was not trained on, rather than the last one looked at."""
        return now() if self.queue.front is None else self.queue.front.resume_state

    def save(self, path: Path) -> None:
        """Write the prefixes and the place in the data."""
        front = self.queue.front
        fingerprints = {chunk.first_ordinal + row: _fingerprint(chunk.messages[row]) for chunk, row in self.queue}
        self.bank.save(path, self._next_ordinal if front is None else front.first_ordinal, fingerprints)

    def load(self, path: Path) -> None:
        """Read what `save` wrote; the prompts are fetched again, and must be the same."""
        bank, self._next_ordinal, fingerprints = PrefixBank.load(path)
        if self.queue.lag > 0:
            self.bank, self._expected = bank, fingerprints


def _fingerprint(messages: Any) -> int:
    return zlib.crc32(repr(list(messages)).encode())
