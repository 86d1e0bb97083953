"""Judge how far a run's old log-probs are from recomputed ones: the comparison, its bounds, and what breaks them.

`verify.py` computes; this file imports no torch.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

SEGMENTS = ("prefix", "continuation")
ENOUGH = 50
"""Tokens from which two versions can be told apart. A few near-certain ones look alike under any two."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token is: the line of `<step>.jsonl`, and the token of its response, both counted from 1."""

    step: int
    line: int
    token: int

    def __str__(self) -> str:
        return f"token {self.token} of the sample in line {self.line} of {self.step}.jsonl"


@dataclass
class Comparison:
    """Absolute differences, in nats, between logged old log-probs and recomputed ones.

    Attributes:
        claimed: differences under the version that the run claims for each token.
        places: where each of these tokens is.
        others: differences under every other version with a checkpoint, by its distance from the claimed one.
    """

    claimed: list[float] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    others: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Bounds:
    """What a run must keep to. The defaults are those of the toy model in float32.

    Runs of it had 2e-7 to 4e-7 in the mean and 1e-6 to 1.1e-5 at the worst token. Plain transformers in float32 was off
    by 1.5e-5 from float64 there (log-prob -4.5, temperature 0.7).

    Attributes:
        largest: most nats between the claimed version and the run, at the worst token.
        mean: most nats between the claimed version and the run, in the mean of a segment's tokens.
        apart: least nats between any other version and the run, at the most different token, at each distance that
            `ENOUGH` tokens have. Without this bound equal weights would pass, whichever of them sampled. 0: other
            versions are not compared.
        expected: segments that must have tokens.
    """

    largest: float = 5e-5
    mean: float = 2e-6
    apart: float = 1e-2
    expected: tuple[str, ...] = SEGMENTS


def broken(comparisons: dict[str, Comparison], bounds: Bounds) -> Iterator[str]:
    """Yield a sentence for each bound that is broken; none if the run is exact. A NaN breaks all bounds."""
    for segment, comparison in comparisons.items():
        if not comparison.claimed:
            if segment in bounds.expected:
                [other] = (name for name in SEGMENTS if name != segment)
                yield f"{segment}: no tokens, so nothing is proved; if there should be none, give --expect {other}."
            continue
        differences = np.array(comparison.claimed)
        worst = int(differences.argmax())
        largest, mean = float(differences[worst]), float(differences.mean())
        if not largest <= bounds.largest:
            excess = f"{largest - bounds.largest:.1e} over --largest {bounds.largest:g}"
            yield f"{segment}: {largest:.1e} nats from the claimed version, {excess}, at {comparison.places[worst]}."
        if not mean <= bounds.mean:
            excess = f"{mean - bounds.mean:.1e} over --mean {bounds.mean:g}"
            at = f"the worst is {comparison.places[worst]}"
            yield f"{segment}: {mean:.1e} nats from the claimed version in the mean, {excess}; {at}."
        if bounds.apart:
            yield from _too_near(segment, comparison, bounds.apart)


def _too_near(segment: str, comparison: Comparison, apart: float) -> Iterator[str]:
    judged = {distance: values for distance, values in comparison.others.items() if len(values) >= ENOUGH}
    if not judged:
        found = f"{max(map(len, comparison.others.values()))} tokens" if comparison.others else "no other version"
        yield (
            f"{segment}: {found} to compare with, so any weights might have passed; save checkpoints "
            f"(trainer.save_freq=1) of a run that has {ENOUGH} tokens or more of this kind, or give --apart 0."
        )
    for distance, differences in sorted(judged.items()):
        furthest = float(np.max(differences))
        if not furthest >= apart:
            lack = f"{apart - furthest:.1e} short of --apart {apart:g}"
            yield (
                f"{segment}: the version {distance:+d} from the claimed one is {furthest:.1e} nats away at the most, "
                f"{lack}, so it would have passed as well."
            )
