"""Typical response lengths, for prefixes whose length is a fraction of them."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from recipe.soup.prefixes.files import read_arrays, write_arrays

TYPICAL_FILE = "soup_lengths.npz"
MEMORY = 0.9
"""Weight that the run's mean keeps in each step; the rest goes to the step's own mean."""


class TypicalLengths:
    """Know the mean response length of each prompt's last visit; for new prompts, the run's moving mean.

    Keeps two numbers for each prompt.

    Args:
        response_length: `data.max_response_length`; half of it is the guess before the first step.
    """

    def __init__(self, response_length: int) -> None:
        self._run = response_length / 2
        self._prompts: dict[int, float] = {}

    def __call__(self, prompt: int) -> float:
        """Return the typical length in tokens of a response to the prompt with this fingerprint."""
        return self._prompts.get(prompt, self._run)

    def add(self, responses: Iterable[tuple[int, int]]) -> None:
        """Take in one step's responses, each as (fingerprint of the prompt, length in tokens)."""
        visits: dict[int, list[int]] = defaultdict(list)
        for prompt, length in responses:
            visits[prompt].append(length)
        if visits:
            mean = float(np.mean([length for lengths in visits.values() for length in lengths]))
            # Before the first step the run's mean is only a guess.
            self._run = MEMORY * self._run + (1 - MEMORY) * mean if self._prompts else mean
            self._prompts.update({prompt: float(np.mean(lengths)) for prompt, lengths in visits.items()})

    def save(self, folder: Path) -> None:
        """Write everything into a checkpoint's folder."""
        prompts = np.array(list(self._prompts), dtype=np.int64)
        write_arrays(
            folder / TYPICAL_FILE, run=self._run, prompts=prompts, lengths=np.array(list(self._prompts.values()))
        )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, if there is anything."""
        if (folder / TYPICAL_FILE).exists():
            with read_arrays(folder / TYPICAL_FILE) as arrays:
                self._run = float(arrays["run"])
                self._prompts = dict(zip(arrays["prompts"].tolist(), arrays["lengths"].tolist(), strict=True))
