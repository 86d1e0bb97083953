"""The rollout side with tools: a prefix is the beginning of the first turn, and never goes beyond it.

The first turn ends where the engine stops: at the call of a tool, or at the response's end. If it ended within the
prefix, the loop runs the tool for real, and the current policy writes the next turn.
"""

from typing import Any, cast

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.tool_agent_loop import AgentData, AgentState, ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall
from verl.tools.schemas import ToolResponse
from verl.utils.tokenizer.continuous_token import MergeResult

from recipe.soup.algorithm.batch import NOBODY
from recipe.soup.names import TOOL_AGENT_NAME
from recipe.soup.prefixes.requests import PrefixRequest
from recipe.soup.verl_adapter.mixed_loop import MixedAgentLoop

VerlsLoop: Any = ToolAgentLoop  # behind verl's decorator a type checker sees any agent loop


@register(TOOL_AGENT_NAME)
class SoupToolAgentLoop(MixedAgentLoop, VerlsLoop):
    """verl's loop with tools, on a client that knows the sample's prefix. Without orders it is verl's loop.

    What a tool answered, and what joins two turns, was sampled by nobody: version `NOBODY`, and mask 0.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._aligned: list[int] = []

    def _versions(self, output: AgentLoopOutput) -> list[int]:
        mask = output.response_mask
        aligned = self._aligned[: int(self.response_length)]
        return [version if sampled else NOBODY for version, sampled in zip(aligned, mask, strict=True)]

    # ------------------------------------------------------------------ versions, as verl keeps log-probs

    async def ct_merge_assistant_token(
        self,
        runtime_token_ids: list[int],
        assistant_token_ids: list[int],
        response_mask: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[MergeResult, list[int], list[float] | None]:
        merged = await super().ct_merge_assistant_token(
            runtime_token_ids, assistant_token_ids, response_mask, *args, **kwargs
        )
        self._align(merged[0], response_mask, self.turns.versions)
        return merged

    async def ct_merge_context_msg(
        self,
        previous_messages: list[dict],
        updated_messages: list[dict],
        runtime_token_ids: list[int],
        response_mask: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[MergeResult, list[int], list[float] | None]:
        merged = await super().ct_merge_context_msg(
            previous_messages, updated_messages, runtime_token_ids, response_mask, *args, **kwargs
        )
        self._align(merged[0], response_mask)
        return merged

    def _align(self, merge: MergeResult, response_mask: list[int], turn: list[int] | None = None) -> None:
        """Edit the versions as the model's prompt builder edits tokens: it may add some at a turn's end, or drop one.

        verl's own function for log-probs does it; where no token was sampled it writes 0, in whose place `_versions`
        puts `NOBODY`.
        """
        align = self.continuous_token_builder.align_response_metadata
        _, aligned = align(merge, response_mask, cast(list[float], self._aligned), assistant_logprobs=turn)
        self._aligned = cast(list[int], aligned)

    async def _handle_processing_tools_state(self, agent_data: AgentData) -> AgentState:
        before = self._aligned
        state = await super()._handle_processing_tools_state(agent_data)
        if state is AgentState.TERMINATED:
            # The answers of the tools had no room, and verl has left them out.
            self._aligned = before
        return state

    # ------------------------------------------------------------------ prefixes, sampled as the first turn will be

    async def _future_prompt(self, order: PrefixRequest) -> list[int]:
        schemas = self.tool_schemas
        if order.tools and self.tools:
            chosen = [self.tools[name] for name in order.tools if name in self.tools]
            schemas = [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in chosen]
        return await self.ct_build_initial_tokens(list(order.messages), tools=schemas)

    def _first_turn(self, sampling_params: dict[str, Any]) -> dict[str, Any]:
        if not self.tool_parser.stop_token_ids:
            return sampling_params
        stops = {*(sampling_params.get("stop_token_ids") or []), *self.tool_parser.stop_token_ids}
        return {**sampling_params, "stop_token_ids": list(stops)}

    # ------------------------------------------------------------------ what is not supported

    async def _call_tool(
        self, tool_call: FunctionCall, tools_kwargs: dict[str, Any], agent_data: AgentData
    ) -> tuple[ToolResponse, float, dict]:
        answer = await super()._call_tool(tool_call, tools_kwargs, agent_data)
        if answer[0].image or answer[0].video:
            raise ValueError(f"the tool {tool_call.name} answered with an image or a video; only text is supported yet")
        return answer
