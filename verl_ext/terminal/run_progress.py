"""Where a run of verl is, read off its own log lines. Imports no verl; `tests` hold the lines against verl's source."""

import re
from dataclasses import dataclass, field

PHASES = (
    ("", "Ray starts"),
    ("Started a local Ray instance|Connecting to existing Ray cluster", "the trainer's process imports verl"),
    ("create worker group", "the training worker starts"),
    ("actor and ref model engine initialized", "vLLM starts"),
    ("all initialize finished, ready to fit", "rollout workers start, first samples"),
    (r"step:\d+ - |Training Progress:", "training"),
    ("Final validation metrics", "workers stop"),
)
"""A line that shows that a phase has begun, and what is going on in it; in the order in which they come."""
_BAR = re.compile(r"Training Progress:.*?(\d+)/(\d+) \[")
_STEP = re.compile(r"step:(\d+) - (.*)")
_METRIC = re.compile(r"(?:^| - )([^\s:]+):(?:np\.float\d+\()?(-?\d[-+.\deE]*)")
SHOWN = {"critic/score/mean": "reward", "actor/entropy": "entropy", "timing_s/step": "seconds"}
"""Metrics of a step that are shown, and their names there."""


@dataclass
class RunProgress:
    """What is known of a run after the lines that it was fed.

    Attributes:
        phase: index into `PHASES`.
        step, total: of training; total is 0 until it is known.
        shown: the last step's `SHOWN`.
    """

    phase: int = 0
    step: int = 0
    total: int = 0
    shown: dict[str, float] = field(default_factory=dict)

    @property
    def doing(self) -> str:
        """What is going on."""
        return PHASES[self.phase][1]

    @property
    def trains(self) -> bool:
        """Whether steps are being made."""
        return self.doing == "training"

    def feed(self, line: str) -> bool:
        """Take a line of the log; True if it told something new."""
        before = (self.phase, self.step, self.total, self.shown)
        for number in range(self.phase + 1, len(PHASES)):
            if re.search(PHASES[number][0], line):
                self.phase = number
        if bar := _BAR.search(line):
            self.total = int(bar[2])
            if not self.shown:  # bar and metrics come by different ways: either may be ahead
                self.step = int(bar[1])
        if step := _STEP.search(line):
            self.step = int(step[1])
            metrics = dict(_METRIC.findall(step[2]))
            self.shown = {name: float(metrics[key]) for key, name in SHOWN.items() if key in metrics}
        return (self.phase, self.step, self.total, self.shown) != before
