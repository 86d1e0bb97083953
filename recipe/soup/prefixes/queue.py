"""Which prompts come next, and for which of them prefixes are due now."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from recipe.soup.prefixes.plan import PromptPlan


@dataclass(frozen=True)
class Chunk:
    """Prompts that were fetched from the dataloader together, and are handed out together.

    Attributes:
        batch: the fetched rows, in any form.
        first_ordinal: place of the first prompt in the order of training, from 0.
        messages: each prompt's chat messages.
        plans: what each prompt's mixed samples shall look like.
        resume_state: the dataloader's state before the fetch, or None if no checkpoint will need it.
    """

    batch: Any
    first_ordinal: int
    messages: list[Any]
    plans: list[PromptPlan]
    resume_state: Any = None

    @property
    def size(self) -> int:
        return len(self.messages)


class PromptQueue:
    """The prompts of the next steps, as many as the largest lag reaches ahead.

    Counts prompts, not batches: a step that refills filtered groups takes more prompts than others, and the prompts
    behind them move up.

    Args:
        largest_lag: steps to look ahead, at least 0.
        warm_start: `pure`, `fill` or `ramp`.
        prompts_per_step: prompts that a step takes if nothing is refilled.
        last_step: the run's last step; nothing is seeded for later ones.
    """

    def __init__(self, largest_lag: int, warm_start: str, prompts_per_step: int, last_step: int) -> None:
        self.largest_lag = largest_lag
        self.warm_start = warm_start
        self.prompts_per_step = prompts_per_step
        self.last_step = last_step
        self._chunks: deque[Chunk] = deque()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[tuple[Chunk, int]]:
        """Chunk and row of each prompt, in the order of training."""
        return ((chunk, row) for chunk in self._chunks for row in range(chunk.size))

    @property
    def front(self) -> Chunk | None:
        """The chunk that the next `pop` hands out."""
        return self._chunks[0] if self._chunks else None

    def pop(self) -> Chunk | None:
        """Remove and return the next chunk, or None if the queue is empty."""
        if not self._chunks:
            return None
        chunk = self._chunks.popleft()
        self._size -= chunk.size
        return chunk

    def _reach(self, step: int) -> int:
        """Steps ahead that `step` may seed."""
        # Ramp: step t reaches t steps ahead, so it seeds the steps 2t-1 and 2t, until the full lag is reached.
        lag = min(self.largest_lag, step) if self.warm_start == "ramp" else self.largest_lag
        return max(min(lag, self.last_step - step), 0)

    def append(self, chunk: Chunk) -> None:
        """Put a chunk at the end."""
        self._chunks.append(chunk)
        self._size += chunk.size

    def top_up(self, step: int, fetch: Callable[[], Chunk]) -> None:
        """Fetch until the queue holds all prompts that `step` may seed; never any beyond the run's last step."""
        while len(self) < self._reach(step) * self.prompts_per_step:
            self.append(fetch())

    def due(self, step: int) -> list[tuple[Chunk, int]]:
        """Chunk and row of each queued prompt that is to be seeded at `step`, whether or not it was seeded before.

        A prompt that lost its seeds because their host sample failed is due again at the next step, with a lag that
        is shorter by one.
        """
        within = islice(self, self._reach(step) * self.prompts_per_step)
        # The step that will train on a prompt, or an earlier one if groups are refilled before.
        return [
            (chunk, row)
            for i, (chunk, row) in enumerate(within)
            if (version := self.version(chunk.plans[row], step + 1 + i // self.prompts_per_step)) is not None
            and version < step
        ]

    def version(self, plan: PromptPlan, step: int) -> int | None:
        """Version that a prompt of `step` wants its prefixes from, or None if it is not mixed."""
        return target_version(step, plan.steps_ahead, self.warm_start)


def target_version(step: int, lag: int, warm_start: str) -> int | None:
    """Version that `step` wants its prefixes from, or None if it does not mix.

    Args:
        lag: in updates, at least 0.
        warm_start: before version step-1-lag exists: `pure` None, `fill` version 0, `ramp` half the way back.
    """
    lag = min(lag, step // 2) if warm_start == "ramp" else lag
    if lag == 0:
        return None
    version = step - 1 - lag
    return version if version >= 0 else (None if warm_start == "pure" else 0)
