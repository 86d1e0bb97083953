"""The source `dataset`: demonstrations that come with their prompts, whole or their beginnings.

They are a sample of no policy that is known: of another model, or of people. So no ratio can be taken against whoever
wrote them; their tokens are told apart from history by the version -2.
"""

import numpy as np

from recipe.soup.prefixes.demonstrations import Demonstrations, as_prefix
from recipe.soup.prefixes.plan import RunFacts, plan_prompt
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.source import Fetch, PrefixSource
from recipe.soup.settings import SoupSettings
from verl_ext.health import NOTICE, end_run


class DatasetSource(PrefixSource):
    """Hands out the demonstrations of each prompt, which are drawn anew at each visit.

    Of whole ones each is used once at most, and those that are longer than a response may be are left out; prefixes of
    one demonstration may differ in length. Keeps nothing for later.

    Args:
        demonstrations: reads them off what was fetched.
    """

    def __init__(self, settings: SoupSettings, facts: RunFacts, fetch: Fetch, demonstrations: Demonstrations) -> None:
        super().__init__(settings, facts, fetch)
        self._demonstrations = demonstrations
        self._whole = settings.prefix_length.distribution == "whole"
        self._without = self._too_long = 0
        self._said = False

    @property
    def wants_responses(self) -> bool:
        return False  # a fraction is one of the demonstration

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        try:
            found = self._demonstrations(chunk.batch)
        except TypeError as error:
            column = self.settings.demonstrations.column
            end_run(f"algorithm.soup.demonstrations.column={column}: {error}; mend the data, or name another column.")
        counts = [len(plan.lengths) for plan in chunk.plans]
        prompts = enumerate(zip(found, counts, strict=True), start=chunk.first_ordinal)
        slots = [self._of_prompt(ordinal, ids, count) for ordinal, (ids, count) in prompts]
        if not any(slots) and not self._said:
            self._said = True
            print(f"{NOTICE}no prompt that was fetched for step {step} has a demonstration that fits.", flush=True)
        return slots

    def _of_prompt(self, ordinal: int, demonstrations: list[np.ndarray], count: int) -> dict[int, Prefix]:
        """Up to `count` prefixes of a prompt, by slot."""
        fitting = demonstrations
        if self._whole:
            fitting = [ids for ids in demonstrations if len(ids) <= self.facts.response_length]
            self._too_long += len(demonstrations) - len(fitting)
        self._without += not fitting
        # The lengths are drawn from the stream (seed, ordinal); this is another one.
        order = np.random.default_rng([self.facts.seed, ordinal, 5]).permutation(len(fitting))
        prefixes: dict[int, Prefix] = {}
        for slot in range(min(count, len(fitting)) if self._whole or not fitting else count):
            ids = fitting[order[slot % len(order)]]
            # The same draw for each demonstration, stretched to its own length where lengths are fractions.
            length = plan_prompt(self.settings, self.facts, ordinal, len(ids)).lengths[slot]
            prefixes[slot] = as_prefix(ids, length, self.settings.on_eos)
        return {slot: prefix for slot, prefix in prefixes.items() if len(prefix)}

    def metrics(self) -> dict[str, float]:
        """Also how many prompts had no demonstration, and how many of these were longer than a response."""
        told = {"prompts_without": float(self._without), "too_long": float(self._too_long)}
        self._without = self._too_long = 0
        return {**super().metrics(), **{f"soup/demonstrations/{name}": value for name, value in told.items()}}
