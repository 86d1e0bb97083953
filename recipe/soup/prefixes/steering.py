"""What `selection=steered` knows of each prompt: its solved share, how much help it gets, its last responses."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recipe.soup.prefixes.files import read_arrays, write_arrays
from recipe.soup.prefixes.prefix import Prefix, from_arrays, to_arrays
from recipe.soup.settings.steering import SteeringSettings

STEERING_FILE = "soup_steering.npz"
SOLVED, FAILED = 1, 0


@dataclass(frozen=True)
class Stored:
    """A finished response.

    Attributes:
        response: all of its tokens, with their behaviour log-probs and versions.
        visit: the prompt's place in the order of training when it was sampled.
        cut: tokens before the least certain one of its middle half; -1 where the entropy is not known.
    """

    response: Prefix
    visit: int
    cut: int


@dataclass
class PromptState:
    """One prompt.

    Attributes:
        solved: moving average of the solved share of its mixed samples (p).
        help: share of a successful (above 0) or of a failed (below 0) response that its prefixes have (h).
        stored: its last responses by outcome, oldest first.
    """

    solved: float = 0.5
    help: float = 0.0
    stored: dict[int, list[Stored]] = field(default_factory=lambda: {SOLVED: [], FAILED: []})


def withdrawn(settings: SteeringSettings, step: int, last_step: int) -> float:
    """Return the share of its help that a prompt still gets at a step: 1, and at the run's end down to 0 by cosine."""
    first = last_step - settings.withdraw
    if settings.withdraw == 0 or step <= first:
        return 1.0
    return (1 + math.cos(math.pi * min((step - first) / settings.withdraw, 1.0))) / 2


class Steering:
    """Holds the solved share of each prompt's mixed samples near one half.

    Args:
        settings: `algorithm.soup.steering`.
    """

    def __init__(self, settings: SteeringSettings) -> None:
        self._settings = settings
        self.prompts: dict[int, PromptState] = defaultdict(PromptState)

    def visited(self, prompt: int, solved: Sequence[bool]) -> None:
        """Move a prompt's controller by what its samples reached.

        Args:
            solved: whether each mixed sample was; of all samples if none was mixed, whose prefix had no tokens.
        """
        state, a = self.prompts[prompt], self._settings.memory
        state.solved = a * state.solved + (1 - a) * sum(solved) / len(solved)
        limit = self._settings.limit
        state.help = min(max(state.help + self._settings.gain * (0.5 - state.solved), -limit), limit)

    def store(self, prompt: int, solved: bool, stored: Stored) -> None:
        """Keep a response, in place of the oldest one with its outcome."""
        of_outcome = self.prompts[prompt].stored[SOLVED if solved else FAILED]
        of_outcome.append(stored)
        del of_outcome[: -self._settings.kept]

    def prefixes(self, prompt: int, count: int, scale: float) -> list[Prefix]:
        """Cut up to `count` prefixes for a prompt's next visit, none of them empty or complete.

        Each has a response of its own where the last visit that has one of this outcome has several; else they share.

        Args:
            scale: share of the help that is still given.
        """
        state = self.prompts.get(prompt)
        if state is None or state.help * scale == 0:
            return []
        stored = state.stored[SOLVED if state.help > 0 else FAILED]
        last = [response for response in stored if response.visit == stored[-1].visit]
        cuts = [self._cut(last[i % len(last)], abs(state.help) * scale) for i in range(count if last else 0)]
        return [prefix for prefix in cuts if len(prefix)]

    def _cut(self, stored: Stored, share: float) -> Prefix:
        whole = len(stored.response)
        by_entropy = self._settings.cut == "entropy" and stored.cut >= 0
        length = min(stored.cut if by_entropy else round(share * whole), whole - 1)
        return stored.response.first(length)

    @property
    def responses(self) -> int:
        """How many responses are stored."""
        return sum(len(responses) for state in self.prompts.values() for responses in state.stored.values())

    @property
    def nbytes(self) -> int:
        """Bytes in the arrays of all stored responses."""
        return sum(
            stored.response.token_ids.nbytes + stored.response.log_probs.nbytes
            for state in self.prompts.values()
            for responses in state.stored.values()
            for stored in responses
        )

    def adapt(self, response_length: int) -> int:
        """Make what another run left fit this one's settings; returns how many responses are left out as too long."""
        limit, too_long = self._settings.limit, 0
        for state in self.prompts.values():
            state.help = min(max(state.help, -limit), limit)
            for responses in state.stored.values():
                fits = [stored for stored in responses if len(stored.response) <= response_length]
                too_long += len(responses) - len(fits)
                responses[:] = fits[-self._settings.kept :]
        return too_long

    def metrics(self) -> dict[str, float]:
        """Tell of all prompts that have been visited; zeros before the first visit."""
        states = list(self.prompts.values())
        solved = np.array([state.solved for state in states])
        help_given = np.array([state.help for state in states])
        return {
            "soup/steering/prompts": float(len(states)),
            "soup/steering/solved": float(solved.mean()) if states else 0.0,
            "soup/steering/help/mean": float(help_given.mean()) if states else 0.0,
            "soup/steering/help/at_limit": float((abs(help_given) >= self._settings.limit).mean()) if states else 0.0,
            "soup/steering/bytes": float(self.nbytes),
        }

    def save(self, folder: Path) -> None:
        """Write everything into a checkpoint's folder, as plain arrays."""
        states = list(self.prompts.items())
        rows = [
            (number, outcome, stored)
            for number, (_, state) in enumerate(states)
            for outcome, responses in state.stored.items()
            for stored in responses
        ]
        table = [
            (number, outcome, stored.visit, stored.cut, len(stored.response), len(stored.response.version_spans))
            for number, outcome, stored in rows
        ]
        write_arrays(
            folder / STEERING_FILE,
            prompts=np.array([prompt for prompt, _ in states], dtype=np.int64),
            solved=np.array([state.solved for _, state in states]),
            help=np.array([state.help for _, state in states]),
            table=np.array(table, dtype=np.int64).reshape(-1, 6),
            **to_arrays([stored.response for _, _, stored in rows]),
        )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        with read_arrays(folder / STEERING_FILE) as arrays:
            prompts, table = arrays["prompts"].tolist(), arrays["table"].tolist()
            responses = from_arrays(arrays, [(tokens, spans, True) for *_, tokens, spans in table])
            self.prompts.clear()
            for prompt, solved, help_given in zip(prompts, arrays["solved"], arrays["help"], strict=True):
                self.prompts[prompt] = PromptState(float(solved), float(help_given))
        for (number, outcome, visit, cut, *_), response in zip(table, responses, strict=True):
            self.prompts[prompts[number]].stored[outcome].append(Stored(response, visit, cut))
