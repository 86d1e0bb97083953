"""Countdown's calculator, which writes a line into the file that CALCULATED names for each time that it is called."""

import os

from verl.tools.function_tool import get_function_tool

import examples.countdown.calculator  # noqa: F401  (registers the tool, and its parser)

tool = get_function_tool("calculator")
calculate = tool.fn


def counted(a: int, operation: str, b: int) -> str:
    answer = calculate(a, operation, b)
    with open(os.environ["CALCULATED"], "a") as file:
        file.write(f"{a}{operation}{b}={answer}\n")
    return answer


tool.fn = counted
