"""Tell from verl's own log lines where a run is. Imports no verl; tests compare the lines with verl's source."""

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
"""Phases in their order: a pattern for the line that shows that it has begun, and what is going on in it."""
_BAR = re.compile(r"Training Progress:.*?(\d+)/(\d+) \[")
_STEP = re.compile(r"step:(\d+) - (.*)")
_METRIC = re.compile(r"(?:^| - )([^\s:]+):(?:np\.float\d+\()?(-?\d[-+.\deE]*)")
SHOWN = {"critic/score/mean": "reward", "actor/entropy": "entropy", "timing_s/step": "seconds"}
"""Metrics of a step that are shown, and the names under which they are shown."""


@dataclass
class RunProgress:
    """What is known about a run from the log lines so far.

    Attributes:
        phase: index into `PHASES`.
        step, total: last step of training, and number of steps; 0 until it is known.
        shown: the `SHOWN` metrics of the last step.
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
        """Take a line of the log; returns whether it said something new."""
        before = (self.phase, self.step, self.total, self.shown)
        for number in range(self.phase + 1, len(PHASES)):
            if re.search(PHASES[number][0], line):
                self.phase = number
        if bar := _BAR.search(line):
            self.total = int(bar[2])
            if not self.shown:  # bar and metrics come in different ways, and either may be ahead
                self.step = int(bar[1])
        if step := _STEP.search(line):
            self.step = int(step[1])
            metrics = dict(_METRIC.findall(step[2]))
            self.shown = {name: float(metrics[key]) for key, name in SHOWN.items() if key in metrics}
        return (self.phase, self.step, self.total, self.shown) != before
