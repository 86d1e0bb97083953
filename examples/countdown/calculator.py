"""Countdown with a calculator: the model writes `3*5=`, and the tool writes what that is.

verl's agent loop workers load this file by `multi_turn.function_tool_path`, before they make a parser: so the parser is
registered here as well, which verl has no key for.
"""

import json
import re

from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import function_tool

from examples.countdown.task import OPERATIONS

PARSER = "countdown"
"""Its name for `multi_turn.format`."""
_CALL = re.compile(r"(?<!\d)(\d{1,4})([-+*])(\d{1,4})=$")


@function_tool("calculator")
def calculate(a: int, operation: str, b: int) -> str:
    """Compute one step.

    Args:
        a: the first number.
        operation: one of + - *.
        b: the second number.
    """
    return str(OPERATIONS[operation](a, b))


@ToolParser.register(PARSER)
class CalculatorParser(ToolParser):
    """A turn that ends with `=` calls the calculator."""

    @property
    def stop_token_ids(self) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids("=")]

    async def extract_tool_calls(
        self, responses_ids: list[int], tools: list | None = None
    ) -> tuple[str, list[FunctionCall]]:
        """Return the turn's text, and its call; none if there is no step before the `=`."""
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        call = _CALL.search(text)
        if call is None:
            return text, []
        arguments = {"a": int(call[1]), "operation": call[2], "b": int(call[3])}
        return text, [FunctionCall(name="calculator", arguments=json.dumps(arguments))]
