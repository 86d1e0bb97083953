"""The source `replay` with `selection=verified`: what the current policy keeps of a prompt's last responses (SPEC-RL).

Between two steps the trainer scores the stored responses of the next step's prompts. Each is kept up to the first token
that the current policy rejects, and goes on from there. What is kept counts as the current policy's: its version, the
trainer's log-probs, no splice. It is a sample of the current policy where rejected tokens are replaced exactly
(`verification.rejected=residual`) and the weights do not depend on the response; elsewhere it is close to one.
"""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from recipe.soup.prefixes.finished import FinishedSample, fingerprint
from recipe.soup.prefixes.fit import by_epoch, fit
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.replay import ReplaySource
from recipe.soup.prefixes.requests import SampledPrefix
from recipe.soup.prefixes.source import Fetch, PrefixSource
from recipe.soup.prefixes.verification import (
    VERIFIED_FILE,
    Beside,
    accepted,
    drawn_from,
    load_beside,
    residual,
    save_beside,
)
from recipe.soup.settings import SoupSettings

LENGTH = "data.max_response_length"
OTHER_LENGTH = "of responses that could have another length"
NO_DISTRIBUTION = "without the distributions that exact replacement needs"


class Scores(Protocol):
    """The current policy, as far as responses are scored under it."""

    @property
    def eos_token_id(self) -> int:
        """Ends a response that is drawn by hand (`verification.rejected=residual`)."""
        ...

    def log_probs(self, responses: Sequence[SampledPrefix]) -> list[np.ndarray]:
        """Log-probs of the tokens of each response, shape (response_length,)."""
        ...

    def distributions(self, responses: Sequence[SampledPrefix]) -> list[np.ndarray]:
        """Log-probs of all tokens at each place of each response, shape (response_length, vocabulary)."""
        ...


class VerifiedSource(ReplaySource):
    """Keeps a visit's whole responses, and verifies them before the next visit.

    Args:
        scores: the trainer's policy, which is the one that the next step samples with.
    """

    def __init__(self, settings: SoupSettings, facts: RunFacts, fetch: Fetch, scores: Scores) -> None:
        # One step ahead: the next step's prompts are known before the engine wakes up.
        PrefixSource.__init__(self, settings, facts, fetch, lookahead=1)
        self._scores = scores
        self._beside: dict[int, Beside] = {}
        self._ready: dict[int, dict[int, Prefix]] = {}  # by ordinal and slot
        self._told, self._seconds, self._samples = Counter[str](), 0.0, 0

    @property
    def _exact(self) -> bool:
        return self.settings.verification.rejected == "residual"

    # ------------------------------------------------------------------ what a visit leaves

    def _store(self, prompt: int, slot: int, response: FinishedSample, length: int) -> None:
        ids, log_probs, versions = response.token_ids, response.log_probs, response.versions
        self.bank.put(prompt, slot, Prefix.from_response(ids, log_probs, versions, len(ids), "keep"))
        assert response.prompt_ids is not None
        kept = self._beside.setdefault(prompt, Beside(np.array(response.prompt_ids, np.int32)))
        if response.distributions is not None:
            kept.distributions[slot] = response.distributions

    def _drop(self, prompt: int) -> None:
        super()._drop(prompt)
        self._beside.pop(prompt, None)

    # ------------------------------------------------------------------ between two steps

    def updated(self, step: int) -> None:
        """Verify, under version `step`, what the prompts of the next step may start from."""
        self.queue.top_up(step, self._next_chunk)
        stored = self._stored_for_next(step)
        responses = [response for _, response in stored]
        started = time.perf_counter()
        if responses:
            scores = self._scores.distributions if self._exact else self._scores.log_probs
            scored = scores(responses)
            self._seconds += time.perf_counter() - started
        else:
            scored = []
        self._ready = {}
        for (prompt, response), now in zip(stored, scored, strict=True):
            prefix = self._verified(prompt, response, now, step)
            if len(prefix):
                self._ready.setdefault(response.ordinal, {})[response.slot] = prefix

    def _stored_for_next(self, step: int) -> list[tuple[int, SampledPrefix]]:
        """The responses that are left for the next step's prompts, each with its prompt's fingerprint."""
        found: list[tuple[int, SampledPrefix]] = []
        seen: set[int] = set()
        for chunk, row in self.queue:
            prompt, ordinal = fingerprint(chunk.messages[row]), chunk.first_ordinal + row
            if prompt in seen:  # twice in a step: the first one has what the last visit left
                continue
            seen.add(prompt)
            for slot, response in self.bank.of(prompt).items():
                if super()._usable(response, step + 1):
                    ids = self._beside[prompt].prompt_ids.tolist()
                    one = SampledPrefix(ordinal, slot, response, 0, response.complete, prompt_ids=ids)
                    found.append((prompt, one))
        return found

    def _verified(self, prompt: int, asked: SampledPrefix, now: np.ndarray, version: int) -> Prefix:
        """Cut a response at its first rejected token, in whose place another one may be drawn.

        Args:
            now: what `Scores` says of the response.
            version: of the policy that said it.
        """
        stored, length = asked.prefix, len(asked.prefix)
        # Depends on the seed and the prompt's place only, so a resumed run draws the same.
        rng = np.random.default_rng([self.facts.seed, asked.ordinal, 6, asked.slot])
        draws = rng.random(length)
        of_tokens = now[np.arange(length), stored.token_ids] if self._exact else now
        kept = accepted(of_tokens, stored.log_probs, self.settings.verification.leniency, draws)
        self._told.update(responses=1, tokens=length, accepted=kept, whole=int(kept == length))
        ids, log_probs = stored.token_ids[:kept], of_tokens[:kept]
        complete = stored.complete and kept == length
        if self._exact and kept < length:
            then = self._beside[prompt].distributions[asked.slot]
            token = drawn_from(residual(now[kept], then[kept]), rng.random())
            ids, log_probs = np.append(ids, token), np.append(log_probs, now[kept, token])
            complete = token == self._scores.eos_token_id or len(ids) == self.facts.response_length
        spans = ((version, len(ids)),) if len(ids) else ()
        return Prefix(ids.astype(np.int32), log_probs.astype(np.float32), spans, complete)

    # ------------------------------------------------------------------ the next visit

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        # What refills a step was not in the queue between the two steps, and is not mixed.
        self._samples += chunk.size * self.facts.samples
        for messages in chunk.messages:
            self._drop(fingerprint(messages))
        return [self._ready.pop(chunk.first_ordinal + row, {}) for row in range(chunk.size)]

    def _usable(self, prefix: Prefix, step: int) -> bool:
        return True  # age was looked at before it was verified, and now it is the current policy's

    def metrics(self) -> dict[str, float]:
        """Tell of the responses that this step's samples began with, and what it cost to verify them."""
        told, seconds, samples = self._told, self._seconds, self._samples
        self._told, self._seconds, self._samples = Counter(), 0.0, 0
        return {
            **super().metrics(),
            "soup/verified/responses": float(told["responses"]),
            "soup/verified/share": told["responses"] / samples if samples else 0.0,
            "soup/verified/tokens": float(told["tokens"]),
            "soup/verified/accepted": float(told["accepted"]),
            "soup/verified/accepted_share": told["accepted"] / told["tokens"] if told["tokens"] else 0.0,
            "soup/verified/whole": float(told["whole"]),
            "soup/verified/seconds": seconds,
        }

    # ------------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        super().save(folder)
        save_beside(folder, self._beside)

    def load(self, folder: Path) -> None:
        super().load(folder)
        if (folder / VERIFIED_FILE).exists():  # the checkpoint of a run that mixed nothing has none
            self._beside = load_beside(folder)

    def adapt(self, step: int, changed: Collection[str]) -> Counter[str]:
        def judge(prompt: int, slot: int, response: Prefix) -> Prefix | str:
            if LENGTH in changed:  # whether a response was at its end is known for one length only
                return OTHER_LENGTH
            if self._exact and slot not in self._beside[prompt].distributions:
                return NO_DISTRIBUTION
            return of_epoch(prompt, slot, response)

        of_epoch = by_epoch(self.settings, self.facts, step + 1, self.typical_length, cut=False)
        return fit(self.bank, judge)
