"""The source `replay`: prefixes are cut from the responses of the prompt's last visit.

Nothing is sampled for them, so they cost nothing, but prompts must come again. With
`prefix_length.distribution=whole` it is the trajectory-level mixing of RePO and ExGRPO, the paper's baseline.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence

import numpy as np

from recipe.soup.prefixes.finished import FinishedSample, fingerprint
from recipe.soup.prefixes.fit import by_epoch, fit, lengths_among
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.source import PrefixSource


def _certain(visit: list[FinishedSample]) -> list[FinishedSample]:
    """The successes of a visit that also failed, the most probable first: ExGRPO's choice within a prompt."""
    solved = [sample for sample in visit if sample.reward > 0]
    return [] if len(solved) == len(visit) else sorted(solved, key=lambda sample: -sample.log_probs.mean())


Selection = Callable[[list[FinishedSample]], list[FinishedSample]]
SELECTIONS: dict[str, Selection] = {
    "random": list,
    "verified": list,
    # A wrong answer has a reward of 0 or less. If fewer match than are asked for, the next visit mixes fewer samples.
    "failed": lambda visit: [sample for sample in visit if sample.reward <= 0],
    "successful": lambda visit: [sample for sample in visit if sample.reward > 0],
    "certain": _certain,
    "entropic": lambda visit: sorted(visit, key=lambda sample: sample.log_probs.mean()),
}
"""By `selection`: takes a visit's responses, shuffled, and returns those that may be used next time, best first."""


class ReplaySource(PrefixSource):
    """Cuts prefixes from the responses of a prompt's latest visit.

    As many responses are kept as the next visit will mix, chosen by `selection` and already cut; this takes 8 bytes for
    each token that will be used. Mixed responses may be kept as well: each token keeps the version that sampled it.
    """

    @property
    def wants_responses(self) -> bool:
        return True

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        return [self.bank.take(fingerprint(messages)) for messages in chunk.messages]

    def adapt(self, step: int, changed: Collection[str]) -> Counter[str]:
        judge = by_epoch(self.settings, self.facts, step + 1, self.typical_length, lengths_among(changed))
        return fit(self.bank, judge)

    def keep(self, samples: Sequence[FinishedSample]) -> None:
        """Cut this step's responses, and keep them in place of what the prompt's earlier visit left unused."""
        super().keep(samples)
        visits: dict[int, list[FinishedSample]] = defaultdict(list)
        for sample in samples:
            visits[sample.ordinal].append(sample)
        for ordinal, visit in visits.items():
            prompt, next_visit = visit[0].prompt, ordinal + self.facts.prompts_per_epoch
            lengths = self.plan(next_visit, prompt).lengths
            # The lengths are drawn from the stream (seed, ordinal); this is another one.
            rng = np.random.default_rng([self.facts.seed, ordinal, 1])
            shuffled = [visit[index] for index in rng.permutation(len(visit))]
            self._drop(prompt)
            responses = SELECTIONS[self.settings.selection](shuffled)
            for slot, (response, length) in enumerate(zip(responses, lengths, strict=False)):
                self._store(prompt, slot, response, length)

    def _drop(self, prompt: int) -> None:
        """Forget what a prompt's last visit left."""
        self.bank.take(prompt)

    def _store(self, prompt: int, slot: int, response: FinishedSample, length: int) -> None:
        """Keep of a response what the prompt's next visit can use: its first tokens, `length` of them or fewer."""
        ids, log_probs, versions = response.token_ids, response.log_probs, response.versions
        self.bank.put(prompt, slot, Prefix.from_response(ids, log_probs, versions, length, self.settings.on_eos))
