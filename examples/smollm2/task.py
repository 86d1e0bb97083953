"""The arithmetic task: a sum of two or three operands, asked in plain English, answered with a number.

`What is 45 + 51 - 21? Answer with the number only.` A language model of 135 million parameters can read this, and is
right now and then: what reinforcement learning needs to begin with.
"""

import random
import re
from dataclasses import dataclass

LARGEST = 60
"""Of an operand."""
_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """Operands, and the signs between them (`+` or `-`)."""

    operands: tuple[int, ...]
    signs: tuple[str, ...]

    @property
    def expression(self) -> str:
        rest = (f" {sign} {operand}" for sign, operand in zip(self.signs, self.operands[1:], strict=True))
        return f"{self.operands[0]}{''.join(rest)}"

    @property
    def prompt(self) -> str:
        return f"What is {self.expression}? Answer with the number only."

    @property
    def answer(self) -> int:
        rest = zip(self.signs, self.operands[1:], strict=True)
        return self.operands[0] + sum(operand if sign == "+" else -operand for sign, operand in rest)


def is_right(answer: int, response: str) -> bool:
    """True iff the last number of the response is the answer: what stands before it may be the way to it."""
    numbers = _NUMBER.findall(response)
    return bool(numbers) and numbers[-1] == str(answer)


def random_problem(rng: random.Random) -> Problem:
    """Two operands or three, from 1 to `LARGEST`; the answer is not negative."""
    while True:
        size = rng.choice((2, 3))
        operands = tuple(rng.randint(1, LARGEST) for _ in range(size))
        problem = Problem(operands, tuple(rng.choice("+-") for _ in range(size - 1)))
        if problem.answer >= 0:
            return problem
