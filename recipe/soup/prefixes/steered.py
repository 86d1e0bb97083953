"""The source `replay` with `selection=steered`: prefixes whose outcome and length are chosen for each prompt.

Too hard a prompt starts from what once succeeded, too easy a one from what once failed, so that about half of its mixed
samples are solved and its group teaches something. This is biased, and no ratio corrects it: a prefix is drawn given
the outcome of its response, and cut at a share of that response's length.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from recipe.soup.prefixes.finished import FinishedSample, fingerprint
from recipe.soup.prefixes.fit import LONG
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.source import Fetch, PrefixSource
from recipe.soup.prefixes.steering import STEERING_FILE, Steering, Stored, withdrawn
from recipe.soup.settings import SoupSettings


class SteeredSource(PrefixSource):
    """Cuts prefixes from each prompt's last successes or failures, as its controller says."""

    def __init__(self, settings: SoupSettings, facts: RunFacts, fetch: Fetch) -> None:
        super().__init__(settings, facts, fetch)
        self.steering = Steering(settings.steering)
        self._without = 0

    @property
    def wants_responses(self) -> bool:
        return True

    @property
    def wants_evicted(self) -> bool:
        return True

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        scale = withdrawn(self.settings.steering, step, self.facts.last_step)
        slots = []
        for messages, plan in zip(chunk.messages, chunk.plans, strict=True):
            cut = self.steering.prefixes(fingerprint(messages), len(plan.lengths), scale)
            self._without += not cut
            slots.append(dict(enumerate(cut)))
        return slots

    def keep(self, samples: Sequence[FinishedSample]) -> None:
        """Move the controllers, and store the responses; of groups that were evicted as well."""
        visits: dict[int, list[FinishedSample]] = defaultdict(list)
        for sample in samples:
            visits[sample.ordinal].append(sample)
        for ordinal, visit in visits.items():
            prompt = visit[0].prompt
            mixed = [sample for sample in visit if sample.versions[0] != sample.versions[-1]]
            self.steering.visited(prompt, [sample.reward > 0 for sample in mixed or visit])
            for sample in visit:
                response = Prefix.from_response(
                    sample.token_ids, sample.log_probs, sample.versions, len(sample.token_ids), "keep"
                )
                self.steering.store(prompt, sample.reward > 0, Stored(response, ordinal, least_certain(sample.entropy)))

    def metrics(self) -> dict[str, float]:
        without, self._without = self._without, 0
        return {**super().metrics(), **self.steering.metrics(), "soup/steering/without_prefix": float(without)}

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.steering.save(folder)

    def load(self, folder: Path) -> None:
        super().load(folder)
        if (folder / STEERING_FILE).exists():  # the checkpoint of a run that mixed nothing has none
            self.steering.load(folder)

    def adapt(self, step: int, changed: Collection[str]) -> Counter[str]:
        return Counter({LONG: self.steering.adapt(self.facts.response_length)})

    @property
    def holds(self) -> tuple[int, str]:
        # Prefixes are cut when their prompt comes.
        return self.steering.responses, "stored responses"


def least_certain(entropy: np.ndarray | None) -> int:
    """Return how many tokens of a response come before the one with the largest entropy of its middle half.

    Args:
        entropy: nats, shape (response_length,), or None.

    Returns:
        -1 if the entropy is not known, or there is no middle.
    """
    if entropy is None or len(entropy) < 2:
        return -1
    first, last = len(entropy) // 4, 3 * len(entropy) // 4
    return first + int(entropy[first:last].argmax()) if last > first else -1
