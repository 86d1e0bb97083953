"""The countdown task: combine all the given numbers, step by step, to reach a target.

Prompt `3 5 7=22:`, a correct response `3*5=15,15+7=22`. The rules are those of the numbers game: every step takes two
available numbers, and its result becomes available in their place; the last result must be the target.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
MAX_VALUE = 99
"""Largest intermediate or final value: keeps the arithmetic learnable by a model of a third of a million weights."""

_STEP = re.compile(r"(\d{1,4})([-+*])(\d{1,4})=(\d{1,4})")


@dataclass(frozen=True)
class Problem:
    """Numbers to use, each exactly once, and the value to reach."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))}={self.target}:"


def is_solution(problem: Problem, response: str) -> bool:
    """True iff each step is correct arithmetic on available numbers, all are used once, and the target is reached.

    Works by parsing; nothing of the response is ever evaluated as code.
    """
    available = list(problem.numbers)
    result = None
    for text in response.split(","):
        step = _STEP.fullmatch(text)
        if step is None:
            return False
        a, b, result = int(step[1]), int(step[3]), int(step[4])
        for operand in (a, b):
            if operand not in available:
                return False
            available.remove(operand)
        if OPERATIONS[step[2]](a, b) != result:
            return False
        available.append(result)
    return len(available) == 1 and result == problem.target


def random_trace(numbers: tuple[int, ...], rng: random.Random) -> tuple[str, int]:
    """Random correct arithmetic that uses up all numbers: the text of the steps and the final value."""
    while True:
        available, steps = list(numbers), []
        while len(available) > 1:
            rng.shuffle(available)
            a, b = available[:2]
            symbol = rng.choice("+-*")
            value = OPERATIONS[symbol](a, b)
            if not 0 <= value <= MAX_VALUE:
                break
            steps.append(f"{a}{symbol}{b}={value}")
            available[:2] = [value]
        else:
            return ",".join(steps), available[0]


def solutions(problem: Problem) -> list[str]:
    """Every correct response in which no value is above `MAX_VALUE`, in the order of the alphabet."""

    def steps(available: tuple[int, ...]) -> Iterator[str]:
        for i, j in permutations(range(len(available)), 2):
            a, b = available[i], available[j]
            rest = tuple(value for k, value in enumerate(available) if k not in (i, j))
            for symbol, operation in OPERATIONS.items():
                value = operation(a, b)
                if not 0 <= value <= MAX_VALUE:
                    continue
                text = f"{a}{symbol}{b}={value}"
                if rest:
                    yield from (f"{text},{further}" for further in steps((value, *rest)))
                elif value == problem.target:
                    yield text

    return sorted(set(steps(problem.numbers)))


def random_problem(rng: random.Random, size: int = 3) -> Problem:
    """A solvable problem with `size` one-digit numbers."""
    numbers = tuple(rng.randint(1, 9) for _ in range(size))
    return Problem(numbers, random_trace(numbers, rng)[1])
