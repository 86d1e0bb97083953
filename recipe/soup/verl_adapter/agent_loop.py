"""The rollout side: continue a historical prefix token-in token-out, and leave prefixes for the future.

verl imports this module right after its own agent loops, wherever those run; it brings the loop with tools along.
"""

import logging

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from recipe.soup.names import AGENT_NAME
from recipe.soup.verl_adapter.mixed_loop import MixedAgentLoop
from recipe.soup.verl_adapter.tool_loop import SoupToolAgentLoop
from verl_ext.failures import remember_failures

__all__ = ["SoupAgentLoop", "SoupToolAgentLoop"]


class _OnceEach(logging.Filter):
    """Lets each message pass once in a process."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


# verl makes an agent loop for each sample, and warns each time that a model has no prompt builder of its own.
logging.getLogger("verl.utils.tokenizer.continuous_token_wiring").addFilter(_OnceEach())
remember_failures()


@register(AGENT_NAME)
class SoupAgentLoop(MixedAgentLoop, SingleTurnAgentLoop):
    """verl's single-turn loop, on a client that knows the sample's prefix. Without orders it is verl's loop."""

    def _versions(self, output: AgentLoopOutput) -> list[int]:
        return self.turns.versions[: len(output.response_ids)]
