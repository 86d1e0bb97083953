"""The agent loop with tools, with a client that plays the engine: verl's own loop underneath, no Ray."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, ToolListWrap
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.function_tool import FunctionTool, function_tool, load_function_tools_from_path
from verl.tools.schemas import ToolResponse
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tokenizer.continuous_token import ContinuousTokenBuilder, MergeResult
from verl.workers.rollout.replica import TokenOutput

from recipe.soup.algorithm.batch import NOBODY
from recipe.soup.names import REQUESTS_KEY, SAMPLED_KEY
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, SampledPrefix
from recipe.soup.verl_adapter.agent_loop import SoupToolAgentLoop
from recipe.soup.verl_adapter.mixed_loop import SoupAgentLoopOutput
from verl_ext.versioned_client import RUNS_KEY, VersionedLLMServerClient

VERSION, OLD = 7, 4
R = 24
SAMPLING = {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
QUESTION = [{"role": "user", "content": "3 5 7=22:"}]
EOS, EQUALS = 1, 15
DROPS, ADDS = "the builder drops the last token of a turn", "the builder adds a token behind a turn"


class Engine:
    """Writes what the script says next, up to its budget and up to a stop token."""

    def __init__(self, tokenizer: Any, *script: str) -> None:
        self.tokenizer, self.script = tokenizer, list(script)
        self.requests: list[SimpleNamespace] = []

    async def _acquire_server(self, request_id: str, **_: Any) -> tuple[str, Any]:
        return "server", SimpleNamespace(generate=SimpleNamespace(remote=self.generate))

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        pass

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        self.requests.append(SimpleNamespace(prompt_ids=list(prompt_ids), sampling_params=dict(sampling_params)))
        ids = self.tokenizer.encode(self.script.pop(0))[: sampling_params.get("max_tokens", R)]
        stops = [i for i, token in enumerate(ids) if token in (EOS, *sampling_params["stop_token_ids"])]
        ids = ids[: stops[0] + 1] if stops else ids
        versions = {"global_steps": VERSION, "min_global_steps": VERSION, "max_global_steps": VERSION}
        log_probs = [-0.5 - 0.01 * len(self.requests)] * len(ids)
        return TokenOutput(token_ids=ids, log_probs=log_probs, stop_reason="completed", extra_fields=versions)


class SyncedMeanwhile(Engine, VersionedLLMServerClient):
    """The first token of each answer is of the version before."""

    async def generate(self, request_id: str, **kwargs: Any) -> TokenOutput:
        output = await super().generate(request_id, **kwargs)
        output.extra_fields[RUNS_KEY] = [(VERSION - 1, 1), (VERSION, len(output.token_ids) - 1)]
        return output


class Seeding(Engine):
    """A sample of its own ends at once; the prefixes that it hosts solve the problem."""

    async def generate(self, request_id: str, **kwargs: Any) -> TokenOutput:
        self.script = ["3*5=15" if "max_tokens" in kwargs["sampling_params"] else "<eos>"]
        return await super().generate(request_id, **kwargs)


class Editing(ContinuousTokenBuilder):
    """Edits the end of a turn as the builders of Qwen (adds a token) and GLM (drops one) do."""

    def __init__(self, tokenizer: Any, edit: str) -> None:
        super().__init__(tokenizer)
        self._edit = edit

    def _merge_context_token_ids(
        self, runtime_token_ids: list[int], appended_token_ids: list[int], **kwargs: Any
    ) -> MergeResult:
        if self._edit == DROPS:
            kept = list(runtime_token_ids)[:-1]
            return MergeResult(kept + appended_token_ids, len(appended_token_ids), removed_prefix_token_count=1)
        added = self.tokenizer.encode(" ")
        merged = list(runtime_token_ids) + added + appended_token_ids
        return MergeResult(merged, len(appended_token_ids), inserted_token_ids=added)


@pytest.fixture(scope="module")
def tokenizer(countdown_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(countdown_dir / "base_model")


@pytest.fixture(scope="module")
def tools(countdown_dir: Path) -> list[FunctionTool]:
    return load_function_tools_from_path(str(countdown_dir / "calculator.py"))


@pytest.fixture
def run(tokenizer: Any, tools: list[FunctionTool]) -> Any:
    def run(
        engine: Engine,
        prefix: Prefix | None = None,
        loop_class: Any = SoupToolAgentLoop,
        edit: str = "",
        length: int = R,
        tools: list[Any] = tools,
        **extra: Any,
    ) -> Any:
        rollout = {"prompt_length": 16, "response_length": length, "full_determinism": False, "multi_turn": TURNS}
        config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {}})
        orders = PromptRequests(prefixes={0: prefix}) if prefix is not None else PromptRequests()

        async def main() -> AgentLoopOutput:
            loop = cast(Any, loop_class)(
                trainer_config=SimpleNamespace(config=config),
                server_manager=engine,
                tokenizer=tokenizer,
                processor=None,
                dataset_cls=RLHFDataset,
                data_config=SimpleNamespace(config=config.data),
                tools=ToolListWrap(tools),
            )
            if edit:
                loop.continuous_token_builder = Editing(tokenizer, edit)
            given = {REQUESTS_KEY: orders, "raw_prompt": QUESTION, "session_id": 0, **extra}
            return await loop.run(dict(SAMPLING), **given)

        return asyncio.run(main())

    return run


TURNS = {
    "max_user_turns": None,
    "max_assistant_turns": None,
    "max_parallel_calls": 1,
    "max_tool_response_length": 256,
    "tool_response_truncate_side": "middle",
    "format": "countdown",
}
SOLVED = ("3*5=", ",15+7=", "<eos>")


def prefix_of(tokenizer: Any, text: str, complete: bool = False) -> Prefix:
    ids = tokenizer.encode(text)
    return Prefix(np.array(ids, np.int32), np.full(len(ids), -0.25, np.float32), ((OLD, len(ids)),), complete)


def by_token(tokenizer: Any, output: SoupAgentLoopOutput) -> list[tuple[str, int, int, float]]:
    """Each token as it is stored: text, version, mask, log-prob."""
    fields = output.as_dict()
    names = ("policy_versions", "response_mask", "rollout_log_probs")
    versions, mask, log_probs = (fields[name].tolist() for name in names)
    texts = [tokenizer.decode(token) for token in fields["responses"].tolist()]
    return [(t, v, m, round(p, 2)) for t, v, m, p in zip(texts, versions, mask, log_probs, strict=True)]


def turn(text: str, version: int, log_prob: float) -> list[tuple[str, int, int, float]]:
    return [(token, version, 1, log_prob) for token in text]


def nobody(text: str) -> list[tuple[str, int, int, float]]:
    return [(token, NOBODY, 0, 0.0) for token in text]


END = ("<eos>", VERSION, 1)


def test_a_prefix_within_the_turn_is_continued(run: Any, tokenizer: Any) -> None:
    engine, prefix = Engine(tokenizer, "5=", *SOLVED[1:]), prefix_of(tokenizer, "3*")
    output = run(engine, prefix)
    first, second, third = engine.requests
    stops = {"stop_token_ids": [EQUALS]}
    assert first.prompt_ids == output.prompt_ids + prefix.token_ids.tolist()
    assert first.sampling_params == {**SAMPLING, **stops, "max_tokens": R - 2}
    assert second.prompt_ids == output.prompt_ids + tokenizer.encode("3*5=15")
    assert third.prompt_ids == output.prompt_ids + tokenizer.encode("3*5=15,15+7=22")
    assert second.sampling_params == third.sampling_params == {**SAMPLING, **stops}
    assert by_token(tokenizer, output) == [
        *turn("3*", OLD, -0.25), *turn("5=", VERSION, -0.51), *nobody("15"), *turn(",15+7=", VERSION, -0.52),
        *nobody("22"), (*END, -0.53),
    ]  # fmt: skip
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (OLD, VERSION)
    assert output.num_turns == 6


def test_a_prefix_that_ended_the_turn_calls_the_tool_and_the_current_policy_goes_on(run: Any, tokenizer: Any) -> None:
    engine = Engine(tokenizer, *SOLVED[1:])
    output = run(engine, prefix_of(tokenizer, "3*5=", complete=True))
    assert [tokenizer.decode(r.prompt_ids[len(output.prompt_ids) :]) for r in engine.requests] == [
        "3*5=15",
        "3*5=15,15+7=22",
    ]
    assert by_token(tokenizer, output) == [
        *turn("3*5=", OLD, -0.25), *nobody("15"), *turn(",15+7=", VERSION, -0.51), *nobody("22"), (*END, -0.52),
    ]  # fmt: skip
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (OLD, VERSION)


def test_a_prefix_that_ended_without_a_call_is_the_whole_sample(run: Any, tokenizer: Any) -> None:
    engine = Engine(tokenizer)
    output = run(engine, prefix_of(tokenizer, "3*<eos>", complete=True))
    assert engine.requests == []
    assert output.policy_versions == [OLD] * 3


def test_a_turn_that_only_the_prefix_begins_may_call_nothing(run: Any, tokenizer: Any) -> None:
    """A step that cannot be read is no call: the response ends there."""
    engine = Engine(tokenizer, "=")
    assert by_token(tokenizer, run(engine, prefix_of(tokenizer, "3*"))) == [
        *turn("3*", OLD, -0.25),
        *turn("=", VERSION, -0.51),
    ]
    assert len(engine.requests) == 1


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("edit", [DROPS, ADDS])
def test_versions_follow_a_builder_that_edits_the_end_of_a_turn(
    run: Any, tokenizer: Any, edit: str, complete: bool
) -> None:
    engine = Engine(tokenizer, *(SOLVED[1:] if complete else ("5=", *SOLVED[1:])))
    output = run(engine, prefix_of(tokenizer, "3*5=" if complete else "3*", complete), edit=edit)
    last, joint = (slice(-1), "") if edit == DROPS else (slice(None), " ")
    first = turn("3*5=", OLD, -0.25) if complete else [*turn("3*", OLD, -0.25), *turn("5=", VERSION, -0.51)]
    second = turn(",15+7=", VERSION, -0.51 if complete else -0.52)
    assert by_token(tokenizer, output) == [
        *first[last], *nobody(f"{joint}15"), *second[last], *nobody(f"{joint}22"),
        (*END, -0.52 if complete else -0.53),
    ]  # fmt: skip


@pytest.mark.parametrize("length", [5, 6, 7, 12, 13, 14])
@pytest.mark.parametrize("prefix", ["", "3*", "3*5="])
@pytest.mark.parametrize("edit", ["", DROPS, ADDS])
def test_a_response_that_is_full(run: Any, tokenizer: Any, length: int, prefix: str, edit: str) -> None:
    """Whether the tool's answer has no room, or a turn is cut off: as many versions as tokens, NOBODY where masked."""
    complete = prefix == SOLVED[0]
    script = SOLVED[1:] if complete else (SOLVED[0].removeprefix(prefix), *SOLVED[1:])
    given = prefix_of(tokenizer, prefix, complete) if prefix else None
    output = run(Engine(tokenizer, *script), given, edit=edit, length=length)
    verls = run(Engine(tokenizer, *SOLVED), None, ToolAgentLoop, edit=edit, length=length)
    assert output.response_ids == verls.response_ids
    assert output.response_mask == verls.response_mask
    assert len(output.response_ids) <= length
    kept = min(len(prefix), len(prefix) - (edit == DROPS and complete and 0 in output.response_mask))
    expected = [OLD] * kept + [VERSION] * (len(output.response_ids) - kept)
    masked = [v if m else NOBODY for v, m in zip(expected, output.response_mask, strict=True)]
    assert output.policy_versions == masked


@pytest.mark.parametrize("edit", ["", DROPS, ADDS])
def test_without_orders_it_is_verls_loop(run: Any, tokenizer: Any, edit: str) -> None:
    """The twin's: whatever verl stores of a sample is the same, and what the engine is asked."""
    engines = [Engine(tokenizer, *SOLVED) for _ in range(3)]
    verls, twins, validations = (
        run(engines[0], None, ToolAgentLoop, edit=edit),
        run(engines[1], None, edit=edit),
        run(engines[2], None, edit=edit, **{REQUESTS_KEY: None}),
    )
    for ours, engine in ((twins, engines[1]), (validations, engines[2])):
        assert engine.requests == engines[0].requests
        theirs, fields = verls.as_dict(), ours.as_dict()
        versions = fields.pop("policy_versions")
        assert fields["extra_fields"].pop(SAMPLED_KEY) == []
        assert theirs.keys() == fields.keys()
        for name, value in theirs.items():
            same = value.equal(fields[name]) if hasattr(value, "equal") else value == fields[name]
            assert same or name == "metrics", name  # seconds
        mask = theirs["response_mask"]
        assert versions.tolist() == [VERSION if sampled else NOBODY for sampled in mask.tolist()]
        assert 0 in mask


def test_versions_that_changed_in_the_middle_of_turns(run: Any, tokenizer: Any) -> None:
    output = run(SyncedMeanwhile(tokenizer, "5=", *SOLVED[1:]), prefix_of(tokenizer, "3*"))
    before, now = VERSION - 1, VERSION
    second = [before] + [now] * 5
    assert output.policy_versions == [OLD, OLD, before, now, NOBODY, NOBODY, *second, NOBODY, NOBODY, before]
    assert RUNS_KEY not in output.as_dict()["extra_fields"]


def test_a_tool_that_answers_with_an_image_loses_the_sample(
    run: Any, tokenizer: Any, tools: list[FunctionTool]
) -> None:
    async def picture(**_: Any) -> ToolResponse:
        return ToolResponse(image=[object()])

    painter = FunctionTool("calculator", picture, tools[0].tool_schema, is_async=True)
    with pytest.raises(ValueError, match="the tool calculator answered with an image"):
        run(Engine(tokenizer, *SOLVED), tools=[painter])


class TestSeeding:
    @staticmethod
    def seeds(run: Any, engine: Engine, **order: Any) -> list[SampledPrefix]:
        requests = PromptRequests(requests={0: [PrefixRequest(40, QUESTION, {0: 2, 1: 4, 2: 6}, "keep", **order)]})
        output = run(engine, **{REQUESTS_KEY: requests})
        return [SampledPrefix.unpack(packed) for packed in output.as_dict()["extra_fields"][SAMPLED_KEY]]

    def test_a_prefix_ends_where_the_engine_stops_and_calls_no_tool(
        self, run: Any, tokenizer: Any, tools: list[FunctionTool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[Any] = []
        function = tools[0].fn
        monkeypatch.setattr(tools[0], "fn", lambda **given: calls.append(given) or function(**given))
        engine = Seeding(tokenizer)
        seeds = self.seeds(run, engine)
        assert calls == []
        own, *seeding = sorted(engine.requests, key=lambda request: "max_tokens" in request.sampling_params)
        assert [request.sampling_params.pop("max_tokens") for request in seeding] == [3, 5, 7]
        # As the first turn of a sample of that prompt.
        assert all(vars(request) == vars(own) for request in seeding)
        assert [(tokenizer.decode(seed.prefix.token_ids), seed.prefix.complete) for seed in seeds] == [
            ("3*", False),
            ("3*5=", True),
            ("3*5=", True),
        ]

    def test_prompts_are_told_of_the_tools_that_they_may_call(
        self, run: Any, tokenizer: Any, tools: list[FunctionTool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The template writes down how many tools there are: as verl does for the sample itself."""

        @function_tool("nothing")
        def nothing() -> str:
            """Do nothing."""
            return ""

        counts = "{{ tools | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        monkeypatch.setattr(tokenizer, "chat_template", counts)
        several = [*tools, FunctionTool("nothing", nothing, tools[0].tool_schema)]
        for chosen, count in (((), "2"), (("nothing",), "1"), (("nothing", "unknown"), "1")):
            engine = Seeding(tokenizer)
            requests = PromptRequests(requests={0: [PrefixRequest(40, QUESTION, {0: 2}, "keep", tools=chosen)]})
            extra = {"extra_info": {"tool_selection": list(chosen)}}
            run(engine, tools=several, **{REQUESTS_KEY: requests}, **extra)
            prompts = {tokenizer.decode(request.prompt_ids) for request in engine.requests}
            assert prompts == {f"{count}3 5 7=22:"}
