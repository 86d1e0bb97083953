"""The base of all sources of prefixes: what the trainer calls, and what every source does the same way.

In each step the trainer calls `take` for each chunk of prompts that it trains on, `order` once, `generated` when the
step's samples are there, `harvest` and `keep` with what they bring back, and `updated` after the weights have changed.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.prefixes.finished import FinishedSample, fingerprint
from recipe.soup.prefixes.fit import by_plan, fit, lengths_among
from recipe.soup.prefixes.plan import PromptPlan, RunFacts, plan_prompt
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk, PromptQueue
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, PromptWithTools, SampledPrefix
from recipe.soup.prefixes.response_lengths import TypicalLengths
from recipe.soup.settings import SoupSettings
from verl_ext.health import end_run

BANK_FILE = "soup_bank.npz"

Fetch = Callable[[], tuple[Any, list[Any], Any]]
"""Reads prompts from the dataloader; returns the batch, its chat messages, and the dataloader's state before it.

A prompt that may call some of the run's tools only is a `PromptWithTools` in the place of its chat messages.
"""


class PrefixSource(ABC):
    """Fetches prompts in order, keeps prefixes for those that come next, and hands both out.

    Args:
        settings: `algorithm.soup`.
        facts: what the source must know about the run.
        fetch: reads the next prompts.
        lookahead: number of steps for which prompts are fetched ahead of time.
        warm_start: `warm_start` of the `PromptQueue`.
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
        # (ordinal, slot) of each prefix that is being sampled.
        self.in_flight: set[tuple[int, int]] = set()

    @staticmethod
    def _no_cost() -> dict[str, int]:
        return dict.fromkeys(("requests", "arrived", "tokens", "ended", "too_old"), 0)

    @property
    def mixes(self) -> bool:
        """Whether this run mixes at all."""
        return self.settings.mixes

    @property
    def wants_responses(self) -> bool:
        """Whether the trainer must hand over every trained sample (`keep`)."""
        return self.mixes and self.settings.prefix_length.unit == "fraction"

    @property
    def wants_evicted(self) -> bool:
        """Whether `keep` is for the samples of groups as well that are never trained on (`algorithm.filter_groups`)."""
        return False

    def plan(self, ordinal: int, prompt: int) -> PromptPlan:
        """Draw what the mixed samples of the prompt, given by its `fingerprint`, at this place shall look like."""
        return plan_prompt(self.settings, self.facts, ordinal, self.typical_length(prompt))

    def _next_chunk(self) -> Chunk:
        batch, messages, state = self._fetch()
        ordinals = range(self._next_ordinal, self._next_ordinal + len(messages))
        prompts = [fingerprint(message) for message in messages]
        for ordinal, prompt in zip(ordinals, prompts, strict=True):
            if self._expected.pop(ordinal, None) not in (None, prompt):
                end_run(
                    f"Prompt {ordinal} of the resumed run is not the one that the checkpoint holds prefixes for: keep "
                    "data.train_files, data.seed and data.shuffle, or begin without these prefixes by "
                    "algorithm.soup.resume_bank=fresh."
                )
        self._next_ordinal += len(messages)
        plans = [self.plan(ordinal, prompt) for ordinal, prompt in zip(ordinals, prompts, strict=True)]
        return Chunk(batch, ordinals.start, messages, plans, state)

    def take(self, step: int) -> tuple[Chunk, list[dict[int, Prefix]]]:
        """Hand out the prompts that come next, and for each its prefixes by sample."""
        chunk = self.queue.pop() or self._next_chunk()
        sharing = self.settings.samples_per_prefix
        used = [
            {slot: prefix for slot, prefix in slots.items() if self._usable(prefix, step)}
            for slots in self._prefixes(chunk, step)
        ]
        return chunk, [
            {slot * sharing + sample: prefix for slot, prefix in slots.items() for sample in range(sharing)}
            for slots in used
        ]

    def _usable(self, prefix: Prefix, step: int) -> bool:
        """Whether a prefix is history in this step, and not too old; what is too old is counted."""
        oldest = self.settings.max_age
        if oldest is not None and step - 1 - prefix.oldest > oldest:
            self._cost["too_old"] += 1
            return False
        # A refill may reach prompts of a later step, whose prefixes are not older than this step's version.
        return prefix.newest < step - 1

    @abstractmethod
    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        """Take the prefixes of these prompts out of the bank; returns for each prompt its prefixes by slot."""

    def _by_ordinal(self, chunk: Chunk) -> list[dict[int, Prefix]]:
        """`_prefixes` of a source that puts prefixes into the bank under the ordinals of their prompts."""
        return [self.bank.take(chunk.first_ordinal + row) for row in range(chunk.size)]

    def _missing(self, chunk: Chunk, row: int) -> PrefixRequest | None:
        """Return a request for what is still to be sampled for a prompt, or None if that is nothing."""
        ordinal, settings = chunk.first_ordinal + row, self.settings
        present = self.bank.slots(ordinal)
        lengths = {
            slot: n
            for slot, n in enumerate(chunk.plans[row].lengths)
            if slot not in present and (ordinal, slot) not in self.in_flight
        }
        with_prompt = settings.behavior_log_probs == "trainer"
        prompt, tools = chunk.messages[row], ()
        if isinstance(prompt, PromptWithTools):
            prompt, tools = prompt.messages, prompt.tools
        request = PrefixRequest(ordinal, prompt, lengths, settings.on_eos, settings.candidates, with_prompt, tools)
        return request if lengths else None

    def order(self, step: int, rows: list[PromptRequests]) -> None:
        """Arrange for the prefixes that later steps will need; `rows` ride on this step's prompts."""
        return None

    def late(self, chunk: Chunk, step: int) -> list[dict[int, PrefixRequest]]:
        """Return for each prompt of a chunk what a past version samples as soon as a sample begins, by sample."""
        return [{} for _ in chunk.messages]

    def generated(self, step: int) -> None:
        """Called when the step's samples are there and the rollout engine rests."""
        return None

    def harvest(self, arrived: Iterable[SampledPrefix]) -> None:
        """Count the prefixes that have arrived, and keep those whose prompts are still to come."""
        front = self.queue.front
        for sampled in arrived:
            self._count(sampled)
            self.in_flight.discard((sampled.ordinal, sampled.slot))
            if front is not None and sampled.ordinal >= front.first_ordinal:
                self.bank.put(sampled.ordinal, sampled.slot, sampled.prefix)

    def _count(self, sampled: SampledPrefix) -> None:
        self._cost["arrived"] += sampled.answers
        self._cost["tokens"] += sampled.sampled
        self._cost["ended"] += sampled.ended

    def keep(self, samples: Sequence[FinishedSample]) -> None:
        """Learn from responses that were trained on, for their prompts' next visit."""
        self.typical_length.add((sample.prompt, len(sample.token_ids)) for sample in samples)

    def updated(self, step: int) -> None:
        """Called when the weights have become version `step` and the rollout engine still rests."""
        return None

    def validated(self, step: int, score: float) -> None:
        """Called when version `step` has reached `score` in validation."""
        return None

    def metrics(self) -> dict[str, float]:
        """Return what prefixes have cost since the last call, in requests and tokens, and what is kept."""
        cost, self._cost = self._cost, self._no_cost()
        return {
            "soup/cost/seed_requests": cost["requests"],
            "soup/cost/seed_tokens": cost["tokens"],
            "soup/cost/seeds_lost": cost["requests"] - cost["arrived"],
            "soup/cost/seeds_ended": cost["ended"],
            "soup/cost/too_old": cost["too_old"],
            "soup/bank/prefixes": len(self.bank),
            "soup/bank/bytes": self.bank.nbytes,
            "soup/queue/prompts": len(self.queue),
        }

    def resume_state(self, now: Callable[[], Any]) -> Any:
        """Return the dataloader's state at the first prompt that was not trained on; it may have read further."""
        return now() if self.queue.front is None else self.queue.front.resume_state

    def save(self, folder: Path) -> None:
        """Write the prefixes and the place in the data into a checkpoint's folder."""
        front = self.queue.front
        fingerprints = {chunk.first_ordinal + row: fingerprint(chunk.messages[row]) for chunk, row in self.queue}
        place = self._next_ordinal if front is None else front.first_ordinal
        self.bank.save(folder / BANK_FILE, self.facts.origin, place, fingerprints)
        self.typical_length.save(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; the same prompts must come when they are fetched again.

        Raises:
            UnreadableError: what is there cannot be read.
        """
        self.bank, self._next_ordinal, self._expected = PrefixBank.load(folder / BANK_FILE)
        self.typical_length.load(folder)

    @property
    def holds(self) -> tuple[int, str]:
        """How many of what is kept for later steps."""
        return len(self.bank), "prefixes"

    def start_at(self, step: int) -> None:
        """Begin after a step of a run whose prefixes are left out."""
        self._next_ordinal = step * self.facts.prompts_per_step

    def adapt(self, step: int, changed: Collection[str]) -> Counter[str]:
        """Drop or shorten what was loaded and does not fit these settings.

        Args:
            step: the last one that was trained.
            changed: keys whose values are not those that shaped the bank.

        Returns:
            How many prefixes, by what was wrong with them.
        """
        length = {ordinal: self.typical_length(prompt) for ordinal, prompt in self._expected.items()}
        place = self._next_ordinal, step + 1
        return fit(self.bank, by_plan(self.settings, self.facts, place, length, lengths_among(changed)))
