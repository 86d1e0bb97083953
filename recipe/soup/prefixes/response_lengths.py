"""How long responses typically are, for prefix lengths that are fractions of it."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

TYPICAL_FILE = "soup_lengths.npz"
MEMORY = 0.9
"""Weight of the past, a step, in the run's mean."""


class TypicalLengths:
    """The mean response length of each prompt's last visit; for prompts not seen before, the run's moving mean.

    Holds two numbers a prompt.

    Args:
        response_length: `data.max_response_length`; half of it is the guess before the first step.
    """

    def __init__(self, response_length: int) -> None:
        self._run = response_length / 2
        self._prompts: dict[int, float] = {}

    def __call__(self, prompt: int) -> float:
        """Tokens of a typical response to a prompt, given its fingerprint."""
        return self._prompts.get(prompt, self._run)

    def add(self, responses: Iterable[tuple[int, int]]) -> None:
        """Take in one step's (prompt, response length)."""
        visits: dict[int, list[int]] = defaultdict(list)
        for prompt, length in responses:
            visits[prompt].append(length)
        if visits:
            mean = float(np.mean([length for lengths in visits.values() for length in lengths]))
            # Before the first step the run's mean is only a guess.
            self._run = MEMORY * self._run + (1 - MEMORY) * mean if self._prompts else mean
            self._prompts.update({prompt: float(np.mean(lengths)) for prompt, lengths in visits.items()})

    def save(self, folder: Path) -> None:
        """Write into a checkpoint's folder."""
        prompts = np.array(list(self._prompts), dtype=np.int64)
        np.savez(folder / TYPICAL_FILE, run=self._run, prompts=prompts, lengths=np.array(list(self._prompts.values())))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, if it was there."""
        if (folder / TYPICAL_FILE).exists():
            with np.load(folder / TYPICAL_FILE, allow_pickle=False) as arrays:
                self._run = float(arrays["run"])
                self._prompts = dict(zip(arrays["prompts"].tolist(), arrays["lengths"].tolist(), strict=True))
