"""Queue the prompts that come next, and say for which of them prefixes are due now."""

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
        batch: the rows that were fetched, in any form.
        first_ordinal: the first prompt's place in the order of training, from 0.
        messages: chat messages of each prompt.
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
        last_step: the run's last step; no prefix is sampled for a later one.
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
        """Iterate over the prompts in the order of training, each as its chunk and its row."""
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
        """Return how many steps ahead `step` may sample prefixes."""
        # Ramp: step t reaches t steps ahead, so it serves the steps 2t-1 and 2t, until the full lag is reached.
        lag = min(self.largest_lag, step) if self.warm_start == "ramp" else self.largest_lag
        return max(min(lag, self.last_step - step), 0)

    def append(self, chunk: Chunk) -> None:
        """Put a chunk at the end."""
        self._chunks.append(chunk)
        self._size += chunk.size

    def top_up(self, step: int, fetch: Callable[[], Chunk]) -> None:
        """Fetch all prompts that `step` may sample prefixes for, but none beyond the run's last step."""
        while len(self) < self._reach(step) * self.prompts_per_step:
            self.append(fetch())

    def due(self, step: int) -> list[tuple[Chunk, int]]:
        """Return chunk and row of each queued prompt whose prefixes are due at `step`, whether or not it has them.

        A prompt that lost its prefixes because their host sample failed is due again at the next step, with a lag that
        is shorter by one.
        """
        within = islice(self, self._reach(step) * self.prompts_per_step)
        # `version` is asked for the step that will train on the prompt; refills may bring its turn forward.
        return [
            (chunk, row)
            for i, (chunk, row) in enumerate(within)
            if (version := self.version(chunk.plans[row], step + 1 + i // self.prompts_per_step)) is not None
            and version < step
        ]

    def version(self, plan: PromptPlan, step: int) -> int | None:
        """Return the version that shall sample the prefixes of a prompt of `step`, or None if it is not mixed."""
        return target_version(step, plan.steps_ahead, self.warm_start)


def target_version(step: int, lag: int, warm_start: str) -> int | None:
    """Return the version that shall sample the prefixes of `step`, or None if it does not mix.

    Args:
        lag: age of the prefixes in updates, at least 0.
        warm_start: what to do before version step-1-lag exists: `pure` gives None, `fill` version 0, `ramp` a lag of
            half the steps so far.
    """
    lag = min(lag, step // 2) if warm_start == "ramp" else lag
    if lag == 0:
        return None
    version = step - 1 - lag
    return version if version >= 0 else (None if warm_start == "pure" else 0)
