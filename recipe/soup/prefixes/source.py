"""What a source of prefixes is to the trainer, and what all of them share.

In each step the trainer calls `take` for each chunk of prompts that it trains on, `order` once, `generated` when the
step's samples are there, `harvest` and `keep` for what they bring back, and `updated` after the weights changed.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.prefixes.plan import PromptPlan, RunFacts, plan_prompt
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk, PromptQueue
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, SampledPrefix
from recipe.soup.prefixes.response_lengths import TypicalLengths
from recipe.soup.settings import SoupSettings

BANK_FILE = "soup_bank.npz"

Fetch = Callable[[], tuple[Any, list[Any], Any]]
"""Reads prompts from the dataloader: the batch, its chat messages, and the dataloader's state before it."""


@dataclass(frozen=True)
class FinishedSample:
    """One trained sample, as the trainer hands it to a source that keeps responses.

    Attributes:
        messages: its prompt's chat messages.
        ordinal: its prompt's place in the order of training.
        token_ids, log_probs, versions: shape (response_length,): the response, and for each token the behaviour
            log-prob and the version that sampled it.
        reward: of the whole response.
    """

    messages: Any
    ordinal: int
    token_ids: np.ndarray
    log_probs: np.ndarray
    versions: np.ndarray
    reward: float


def fingerprint(messages: Any) -> int:
    """63 bits that tell prompts apart, in this run and in a later one."""
    digest = hashlib.blake2b(repr(list(messages)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def read_source(folder: Path) -> str:
    """The source whose prefixes a checkpoint holds."""
    with np.load(folder / BANK_FILE, allow_pickle=False) as arrays:
        return str(arrays["source"])


class PrefixSource:
    """Fetches prompts in order, keeps prefixes for those that come next, and hands both out.

    As it stands it never has a prefix; the sources say where prefixes come from.

    Args:
        settings: `algorithm.soup`.
        facts: of the run.
        fetch: reads the next prompts.
        lookahead: steps for which prompts are fetched ahead of time.
        warm_start: of the look-ahead, as in `PromptQueue`.
    """

    def __init__(
        self, settings: SoupSettings, facts: RunFacts, fetch: Fetch, lookahead: int = 0, warm_start: str = "fill"
    ) -> None:
        self.settings, self.facts = settings, facts
        self._fetch = fetch
        self.queue = PromptQueue(lookahead, warm_start, facts.prompts_per_step, facts.last_step)
        self.bank = PrefixBank()
        self.typical_length = TypicalLengths(facts.response_length)
        self._next_ordinal = 0
        self._expected: dict[int, int] = {}
        self._cost = self._no_cost()
        # Ordinal and slot of prefixes that are being sampled.
        self.in_flight: set[tuple[int, int]] = set()

    @staticmethod
    def _no_cost() -> dict[str, int]:
        return dict.fromkeys(("requests", "arrived", "tokens", "ended"), 0)

    @property
    def mixes(self) -> bool:
        """Whether this run mixes at all."""
        return self.settings.mixes

    @property
    def wants_responses(self) -> bool:
        """Whether the trainer must hand over every trained sample (`keep`)."""
        return self.mixes and self.settings.prefix_length.unit == "fraction"

    def plan(self, ordinal: int, messages: Any) -> PromptPlan:
        """What the mixed samples of the prompt at this place in the data shall look like."""
        return plan_prompt(self.settings, self.facts, ordinal, self.typical_length(fingerprint(messages)))

    def _next_chunk(self) -> Chunk:
        batch, messages, state = self._fetch()
        ordinals = range(self._next_ordinal, self._next_ordinal + len(messages))
        for ordinal, message in zip(ordinals, messages, strict=True):
            if self._expected.pop(ordinal, None) not in (None, fingerprint(message)):
                raise RuntimeError(
                    f"Prompt {ordinal} of the resumed run is not the one that the checkpoint holds prefixes for: keep "
                    "data.train_files, data.seed and data.shuffle, or start anew with trainer.resume_mode=disable."
                )
        self._next_ordinal += len(messages)
        plans = [self.plan(ordinal, message) for ordinal, message in zip(ordinals, messages, strict=True)]
        return Chunk(batch, ordinals.start, messages, plans, state)

    def take(self, step: int) -> tuple[Chunk, list[dict[int, Prefix]]]:
        """The prompts that come next, and for each its prefixes by sample."""
        chunk = self.queue.pop() or self._next_chunk()
        sharing = self.settings.samples_per_prefix
        return chunk, [
            {slot * sharing + sample: prefix for slot, prefix in slots.items() for sample in range(sharing)
             # A refill may come upon prompts of a later step, whose prefixes are not older than this step's version.
             if prefix.newest < step - 1}
            for slots in self._prefixes(chunk, step)
        ]  # fmt: skip

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        return [self.bank.take(chunk.first_ordinal + row) for row in range(chunk.size)]

    def _missing(self, chunk: Chunk, row: int) -> PrefixRequest | None:
        """What is still to be sampled for a prompt, or None."""
        ordinal, settings = chunk.first_ordinal + row, self.settings
        present = self.bank.slots(ordinal)
        lengths = {
            slot: n
            for slot, n in enumerate(chunk.plans[row].lengths)
            if slot not in present and (ordinal, slot) not in self.in_flight
        }
        with_prompt = settings.behavior_log_probs == "trainer"
        order = PrefixRequest(ordinal, chunk.messages[row], lengths, settings.on_eos, settings.candidates, with_prompt)
        return order if lengths else None

    def order(self, step: int, rows: list[PromptRequests]) -> None:
        """Arrange for the prefixes that will be needed later; `rows` ride on this step's prompts."""

    def generated(self, step: int) -> None:
        """The step's samples are there, and the rollout engine rests."""

    def harvest(self, seeds: Iterable[SampledPrefix]) -> None:
        """Keep the prefixes whose prompts are still to come."""
        front = self.queue.front
        for seed in seeds:
            self._cost["arrived"] += seed.answers
            self._cost["tokens"] += seed.sampled
            self._cost["ended"] += seed.ended
            self.in_flight.discard((seed.ordinal, seed.slot))
            if front is not None and seed.ordinal >= front.first_ordinal:
                self.bank.put(seed.ordinal, seed.slot, seed.prefix)

    def keep(self, samples: Sequence[FinishedSample]) -> None:
        """Learn from responses that were trained on, for their prompts' next visit."""
        self.typical_length.add((fingerprint(sample.messages), len(sample.token_ids)) for sample in samples)

    def updated(self, step: int) -> None:
        """The weights became version `step`; the rollout engine still rests."""

    def validated(self, step: int, score: float) -> None:
        """Version `step` reached `score` in validation."""

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

    def save(self, folder: Path) -> None:
        """Write the prefixes and the place in the data into a checkpoint's folder."""
        front = self.queue.front
        fingerprints = {chunk.first_ordinal + row: fingerprint(chunk.messages[row]) for chunk, row in self.queue}
        place = self._next_ordinal if front is None else front.first_ordinal
        self.bank.save(folder / BANK_FILE, self.settings.source, place, fingerprints)
        self.typical_length.save(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; the prompts are fetched again, and must be the same."""
        bank, self._next_ordinal, fingerprints = PrefixBank.load(folder / BANK_FILE)
        if self.mixes:
            self.bank, self._expected = bank, fingerprints
            self.typical_length.load(folder)
