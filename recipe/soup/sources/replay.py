"""The source `replay`: prefixes cut from what the prompt's earlier visits left behind. Imports no verl.

Nothing is sampled for it, so it costs nothing, but it needs prompts that come again. With
`prefix_length.distribution=whole` it is the trajectory-level mixing of RePO and ExGRPO, the paper's baseline.
"""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from recipe.soup.prefixes import Prefix
from recipe.soup.sources.base import FinishedSample, PrefixSource, fingerprint
from recipe.soup.sources.queue import Chunk


class ReplaySource(PrefixSource):
    """Prefixes of the responses of a prompt's latest visit.

    A visit keeps as many of its responses as the next visit will mix, drawn at random and already cut: 8 bytes a
    token that will be used. Mixed responses may be kept as well; each token keeps the version that sampled it.
    """

    wants_responses = True

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        return [self.bank.take(fingerprint(messages)) for messages in chunk.messages]

    def keep(self, samples: Iterable[FinishedSample]) -> None:
        """Cut this step's responses, by prompt; what an earlier visit left and nobody used is replaced."""
        visits: dict[int, list[FinishedSample]] = defaultdict(list)
        for sample in samples:
            visits[sample.ordinal].append(sample)
        for ordinal, visit in visits.items():
            prompt, lengths = fingerprint(visit[0].messages), self.lengths(ordinal)
            # Another stream than the lengths', which are drawn from (seed, ordinal).
            chosen = np.random.default_rng([self.facts.seed, ordinal, 1]).permutation(len(visit))
            self.bank.take(prompt)
            for slot, (index, length) in enumerate(zip(chosen.tolist(), lengths, strict=False)):
                response = visit[index]
                prefix = Prefix.from_response(
                    response.token_ids, response.log_probs, response.versions, length, self.settings.on_eos
                )
                self.bank.put(prompt, slot, prefix)
