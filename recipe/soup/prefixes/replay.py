"""The source `replay`: prefixes cut from what the prompt's earlier visits left behind.

Nothing is sampled for it, so it costs nothing, but it needs prompts that come again. With
`prefix_length.distribution=whole` it is the trajectory-level mixing of RePO and ExGRPO, the paper's baseline.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.source import FinishedSample, PrefixSource, fingerprint

Selection = Callable[[list[FinishedSample]], list[FinishedSample]]
SELECTIONS: dict[str, Selection] = {
    "random": list,
    # Graders give 0 or less for a wrong answer. Fewer than asked for leave the rest of the next visit unmixed.
    "failed": lambda visit: [sample for sample in visit if sample.reward <= 0],
    "successful": lambda visit: [sample for sample in visit if sample.reward > 0],
    "entropic": lambda visit: sorted(visit, key=lambda sample: sample.log_probs.mean()),
}
"""Which of a visit's responses the next visit starts from, by `selection`; from shuffled to best first."""


class ReplaySource(PrefixSource):
    """Prefixes of the responses of a prompt's latest visit.

    A visit keeps as many of its responses as the next visit will mix, chosen by `selection` and already cut: 8 bytes a
    token that will be used. Mixed responses may be kept as well; each token keeps the version that sampled it.
    """

    @property
    def wants_responses(self) -> bool:
        return True

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        return [self.bank.take(fingerprint(messages)) for messages in chunk.messages]

    def keep(self, samples: Sequence[FinishedSample]) -> None:
        """Cut this step's responses, by prompt; what an earlier visit left and nobody used is replaced."""
        super().keep(samples)
        visits: dict[int, list[FinishedSample]] = defaultdict(list)
        for sample in samples:
            visits[sample.ordinal].append(sample)
        for ordinal, visit in visits.items():
            messages = visit[0].messages
            prompt, next_visit = fingerprint(messages), ordinal + self.facts.prompts_per_epoch
            lengths = self.plan(next_visit, messages).lengths
            # Another stream than the lengths', which are drawn from (seed, ordinal).
            rng = np.random.default_rng([self.facts.seed, ordinal, 1])
            shuffled = [visit[index] for index in rng.permutation(len(visit))]
            self.bank.take(prompt)
            responses = SELECTIONS[self.settings.selection](shuffled)
            for slot, (response, length) in enumerate(zip(responses, lengths, strict=False)):
                prefix = Prefix.from_response(
                    response.token_ids, response.log_probs, response.versions, length, self.settings.on_eos
                )
                self.bank.put(prompt, slot, prefix)
