"""The agent loop with a client that plays the engine: verl's own loop underneath, no Ray."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from omegaconf import OmegaConf
from transfer_queue.utils.serial_utils import MsgpackDecoder, MsgpackEncoder
from transformers import AutoTokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from recipe.soup.names import REQUESTS_KEY, SAMPLED_KEY
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, SampledPrefix
from recipe.soup.verl_adapter.agent_loop import SoupAgentLoop
from recipe.soup.verl_adapter.mixed_loop import SoupAgentLoopOutput
from verl_ext.historical_policy.snapshots import Adapter
from verl_ext.versioned_client import RUNS_KEY, VersionedLLMServerClient

VERSION = 7
SAMPLING = {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
RESPONSE_LENGTH = 8
EOS = 1


class FakeEngine:
    """Writes token 5 until its budget is used up or `stops_after` tokens are out, then the end token."""

    def __init__(self, stops_after: int = 100, stop_reason: str = "completed") -> None:
        self.stops_after, self.stop_reason = stops_after, stop_reason
        self.requests: list[SimpleNamespace] = []
        self.acquired = self.released = 0

    async def _acquire_server(self, request_id: str, **_: Any) -> tuple[str, Any]:
        """As verl's client does it; this engine is its own server."""
        self.acquired += 1
        return "server", SimpleNamespace(generate=SimpleNamespace(remote=self.generate))

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        assert server_id == "server"
        self.released += 1

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        self.requests.append(SimpleNamespace(prompt_ids=list(prompt_ids), sampling_params=dict(sampling_params)))
        budget = sampling_params.get("max_tokens", RESPONSE_LENGTH)
        ids = [5] * min(budget, self.stops_after)
        if self.stops_after < budget:
            ids.append(EOS)
        versions = {"global_steps": VERSION, "min_global_steps": VERSION, "max_global_steps": VERSION}
        return TokenOutput(
            token_ids=ids, log_probs=[-0.5] * len(ids), stop_reason=self.stop_reason, extra_fields=versions
        )


class SyncedMeanwhile(FakeEngine, VersionedLLMServerClient):
    """Its first three tokens of each response are of the version before; a client that tells the versions apart."""

    async def generate(self, request_id: str, **kwargs: Any) -> TokenOutput:
        output = await super().generate(request_id, **kwargs)
        output.extra_fields[RUNS_KEY] = [(VERSION - 1, 3), (VERSION, len(output.token_ids) - 3)]
        output.extra_fields["min_global_steps"] = VERSION - 1
        return output


class Moody(FakeEngine):
    """Each response has log-probs of its own; the one with the worst is the second. `loses` fail."""

    LOG_PROBS = (-0.5, -2.0, -1.0)

    def __init__(self, loses: dict[int, str] | None = None) -> None:
        super().__init__()
        self.loses = loses or {}
        self.seedings = 0

    async def generate(self, request_id: str, **kwargs: Any) -> TokenOutput:
        output = await super().generate(request_id, **kwargs)
        if "max_tokens" in kwargs["sampling_params"]:
            mood, self.seedings = self.seedings % 3, self.seedings + 1
            output.log_probs = [self.LOG_PROBS[mood]] * len(output.token_ids)
            if self.loses.get(mood) == "fails":
                raise RuntimeError("out of cache")
            output.stop_reason = self.loses.get(mood, "completed")
        return output


@pytest.fixture
def run(countdown_dir: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(countdown_dir / "base_model")
    config = OmegaConf.create(
        {"actor_rollout_ref": {"rollout": {"prompt_length": 16, "response_length": RESPONSE_LENGTH}}, "data": {}}
    )

    def run(engine: FakeEngine, session_id: int = 0, data: dict | None = None, **extra: Any) -> SoupAgentLoopOutput:
        async def main() -> SoupAgentLoopOutput:
            loop = cast(Any, SoupAgentLoop)(
                trainer_config=SimpleNamespace(config=config),
                server_manager=engine,
                tokenizer=tokenizer,
                processor=None,
                dataset_cls=RLHFDataset,
                data_config=SimpleNamespace(config=data or {}),
            )
            messages = [{"role": "user", "content": extra.pop("content", "3 5 7=22:")}]
            return await loop.run(dict(SAMPLING), raw_prompt=messages, session_id=session_id, **extra)

        return asyncio.run(main())

    return run


def prefix_of(length: int, complete: bool = False) -> Prefix:
    ids = np.arange(2, 2 + length, dtype=np.int32)
    return Prefix(ids, np.full(length, -0.25, np.float32), ((4, length),) if length else (), complete)


def test_without_orders_it_is_verls_loop(run: Any) -> None:
    engine = FakeEngine()
    output = run(engine)
    assert len(engine.requests) == 1
    assert "max_tokens" not in engine.requests[0].sampling_params
    assert output.policy_versions == [VERSION] * RESPONSE_LENGTH
    assert output.as_dict()["extra_fields"][SAMPLED_KEY] == []


@pytest.mark.parametrize("length", [1, 3, RESPONSE_LENGTH - 1])
def test_a_prefix_is_continued_token_in_token_out(run: Any, length: int) -> None:
    engine, prefix = FakeEngine(), prefix_of(length)
    output = run(engine, **{REQUESTS_KEY: PromptRequests(prefixes={0: prefix})})
    request = engine.requests[0]
    assert request.prompt_ids == output.prompt_ids + prefix.token_ids.tolist()
    assert request.sampling_params == {**SAMPLING, "max_tokens": RESPONSE_LENGTH - length}
    assert output.response_ids == prefix.token_ids.tolist() + [5] * (RESPONSE_LENGTH - length)
    fields = output.as_dict()
    assert fields["policy_versions"].tolist() == [4] * length + [VERSION] * (RESPONSE_LENGTH - length)
    assert fields["rollout_log_probs"].tolist() == [-0.25] * length + [-0.5] * (RESPONSE_LENGTH - length)
    assert fields["response_mask"].tolist() == [1] * RESPONSE_LENGTH
    assert output.extra_fields["min_global_steps"] == 4
    assert output.extra_fields["max_global_steps"] == VERSION


def test_a_complete_prefix_is_the_whole_sample_and_nothing_is_generated(run: Any) -> None:
    engine, prefix = FakeEngine(), prefix_of(3, complete=True)
    output = run(engine, **{REQUESTS_KEY: PromptRequests(prefixes={0: prefix})})
    assert engine.requests == []
    assert output.response_ids == prefix.token_ids.tolist()
    assert output.policy_versions == [4, 4, 4]
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (4, 4)


def test_an_empty_prefix_is_a_pure_sample(run: Any) -> None:
    output = run(FakeEngine(), **{REQUESTS_KEY: PromptRequests(prefixes={0: prefix_of(0)})})
    assert output.policy_versions == [VERSION] * RESPONSE_LENGTH


def test_versions_that_changed_in_the_middle_of_a_response_are_told_apart(run: Any) -> None:
    output = run(SyncedMeanwhile())
    assert output.policy_versions == [VERSION - 1] * 3 + [VERSION] * 5
    assert RUNS_KEY not in output.as_dict()["extra_fields"]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_versions_that_changed_behind_a_prefix_are_told_apart(run: Any, length: int) -> None:
    prefix = prefix_of(length)
    output = run(SyncedMeanwhile(), **{REQUESTS_KEY: PromptRequests(prefixes={0: prefix})})
    assert output.response_ids == prefix.token_ids.tolist() + [5] * (RESPONSE_LENGTH - length)
    assert output.policy_versions == [4] * length + [VERSION - 1] * 3 + [VERSION] * (RESPONSE_LENGTH - length - 3)
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (4, VERSION)


def test_a_prefix_of_several_versions_keeps_them(run: Any) -> None:
    prefix = Prefix(np.arange(2, 5, dtype=np.int32), np.zeros(3, np.float32), ((1, 2), (4, 1)))
    output = run(SyncedMeanwhile(), **{REQUESTS_KEY: PromptRequests(prefixes={0: prefix})})
    assert output.policy_versions == [1, 1, 4] + [VERSION - 1] * 3 + [VERSION] * 2
    assert output.extra_fields["min_global_steps"] == 1


def test_only_the_sample_that_was_meant_gets_the_prefix(run: Any) -> None:
    orders = PromptRequests(prefixes={0: prefix_of(3)})
    assert run(FakeEngine(), session_id=1, **{REQUESTS_KEY: orders}).policy_versions == [VERSION] * RESPONSE_LENGTH
    assert 0 in orders.prefixes


def through_transfer_queue(value: Any) -> Any:
    """As TransferQueue hands out what is in it."""
    return MsgpackDecoder().decode(MsgpackEncoder().encode(value))


def test_orders_of_a_checkpoint_come_back_as_dictionaries_and_are_carried_out(run: Any) -> None:
    """transfer_queue.utils.serial_utils: what rides on a prompt that a resumed run sends out again."""
    prefix = Prefix(np.arange(2, 5, dtype=np.int32), np.full(3, -0.25, np.float32), ((3, 1), (4, 2)))
    request = PrefixRequest(40, [{"role": "user", "content": "1 2 3=6:"}], {0: 2, 1: 4}, "keep", tools=("a", "b"))
    orders = PromptRequests(prefixes={0: prefix}, requests={1: [request]})
    stored = through_transfer_queue(orders)
    assert isinstance(stored, dict)
    restored = PromptRequests.unpack(stored)
    assert restored.requests == orders.requests
    assert vars(restored.prefixes[0]).keys() == vars(prefix).keys()
    first = run(FakeEngine(), **{REQUESTS_KEY: stored})
    assert first.response_ids == [2, 3, 4] + [5] * (RESPONSE_LENGTH - 3)
    assert first.policy_versions == [3, 4, 4] + [VERSION] * (RESPONSE_LENGTH - 3)
    second = run(FakeEngine(), session_id=1, **{REQUESTS_KEY: stored})
    assert second.policy_versions == [VERSION] * RESPONSE_LENGTH
    packed = second.as_dict()["extra_fields"][SAMPLED_KEY]
    seeds = [SampledPrefix.unpack(through_transfer_queue(seed)) for seed in packed]
    assert {(seed.ordinal, seed.slot, len(seed.prefix)) for seed in seeds} == {(40, 0, 2), (40, 1, 4)}


class TestSeeding:
    @staticmethod
    def seeds(run: Any, engine: FakeEngine, on_eos: str = "keep", **order: Any) -> list[SampledPrefix]:
        messages = [{"role": "user", "content": "1 2 3=6:"}]
        orders = PromptRequests(requests={0: [PrefixRequest(40, messages, {0: 2, 1: 4}, on_eos, **order)]})
        output = run(engine, **{REQUESTS_KEY: orders})
        return [SampledPrefix.unpack(packed) for packed in output.as_dict()["extra_fields"][SAMPLED_KEY]]

    def test_prefixes_for_the_future_come_from_todays_weights_and_settings(self, run: Any) -> None:
        engine = FakeEngine()
        seeds = self.seeds(run, engine)
        assert {(seed.ordinal, seed.slot, len(seed.prefix), seed.prefix.newest) for seed in seeds} == {
            (40, 0, 2, VERSION),
            (40, 1, 4, VERSION),
        }
        seeding = [request for request in engine.requests if "max_tokens" in request.sampling_params]
        assert {request.sampling_params.pop("max_tokens") for request in seeding} == {3, 5}
        assert all(request.sampling_params == SAMPLING for request in seeding)
        assert not any(seed.ended for seed in seeds)
        assert [seed.sampled for seed in seeds] == [3, 5]
        assert (engine.acquired, engine.released) == (1, 1)  # of one prompt, by one server

    def test_ends_are_found_by_where_the_engine_stopped(self, run: Any) -> None:
        kept = self.seeds(run, FakeEngine(stops_after=2))
        # Slot 0 wanted 2 tokens and the engine went on to the end token; slot 1 wanted 4 and got 2 and the end.
        assert [(seed.slot, seed.prefix.token_ids.tolist(), seed.prefix.complete) for seed in kept] == [
            (0, [5, 5], False),
            (1, [5, 5, EOS], True),
        ]
        cut = self.seeds(run, FakeEngine(stops_after=2), on_eos="cut")
        assert [seed.prefix.token_ids.tolist() for seed in cut] == [[5, 5], [5, 5]]
        assert not any(seed.prefix.complete for seed in cut)
        assert [seed.ended for seed in cut] == [seed.ended for seed in kept] == [False, True]

    def test_the_most_surprising_of_three_candidates_is_kept(self, run: Any) -> None:
        engine = Moody()
        seeds = self.seeds(run, engine, candidates=3)
        budgets = [request.sampling_params.get("max_tokens") for request in engine.requests]
        assert sorted(budget for budget in budgets if budget is not None) == [3, 3, 3, 5, 5, 5]
        assert [(seed.slot, seed.prefix.log_probs.tolist()) for seed in seeds] == [(0, [-2.0] * 2), (1, [-2.0] * 4)]
        assert [(seed.answers, seed.sampled) for seed in seeds] == [(3, 9), (3, 15)]

    @pytest.mark.parametrize("loss", ["fails", "aborted"])
    def test_a_lost_candidate_does_not_lose_the_prefix(self, run: Any, loss: str) -> None:
        seeds = self.seeds(run, Moody(loses={1: loss}), candidates=3)
        assert [(seed.slot, set(seed.prefix.log_probs.tolist())) for seed in seeds] == [(0, {-1.0}), (1, {-1.0})]
        assert [(seed.answers, seed.sampled) for seed in seeds] == [(2, 6), (2, 10)]

    def test_without_any_candidate_there_is_no_prefix(self, run: Any) -> None:
        assert self.seeds(run, Moody(loses={0: "fails", 1: "aborted", 2: "fails"}), candidates=3) == []

    def test_prompt_ids_come_along_if_they_are_asked_for(self, run: Any) -> None:
        engine = FakeEngine()
        seeds = self.seeds(run, engine, with_prompt=True)
        (seeding,) = {tuple(r.prompt_ids) for r in engine.requests if "max_tokens" in r.sampling_params}
        (hosting,) = {tuple(r.prompt_ids) for r in engine.requests if "max_tokens" not in r.sampling_params}
        assert [seed.prompt_ids for seed in seeds] == [list(seeding)] * 2
        assert seeding != hosting
        assert [seed.prompt_ids for seed in self.seeds(run, FakeEngine())] == [None, None]

    def test_weights_that_change_meanwhile_go_by_the_client_which_tells_the_versions_apart(self, run: Any) -> None:
        engine = SyncedMeanwhile()
        seeds = self.seeds(run, engine)
        assert [seed.prefix.version_spans for seed in seeds] == [((VERSION - 1, 2),), ((VERSION - 1, 3), (VERSION, 1))]
        assert engine.acquired == 0  # a server asked directly would not go on with an interrupted response
        assert len(engine.requests) == 3

    def test_an_aborted_request_leaves_no_seed(self, run: Any) -> None:
        assert self.seeds(run, FakeEngine(stop_reason="aborted")) == []

    def test_a_seed_that_fails_does_not_take_its_host_with_it(self, run: Any) -> None:
        class Engine(FakeEngine):
            async def generate(self, request_id: str, **kwargs: Any) -> TokenOutput:
                if kwargs["sampling_params"].get("max_tokens") == 3:  # the seed of slot 0
                    raise RuntimeError("out of cache")
                return await super().generate(request_id, **kwargs)

        messages = [{"role": "user", "content": "1 2 3=6:"}]
        seeds = [PrefixRequest(40, messages, {0: 2}, "keep"), PrefixRequest(41, messages, {0: 4}, "keep")]
        output = run(Engine(), **{REQUESTS_KEY: PromptRequests(requests={0: seeds})})
        assert len(output.response_ids) == RESPONSE_LENGTH
        assert [seed.ordinal for seed in output.seeds] == [41]

    def test_seeds_do_not_outlive_a_host_that_fails(self, run: Any) -> None:
        finished: list[str] = []

        class Engine(FakeEngine):
            async def generate(self, request_id: str, **kwargs: Any) -> TokenOutput:
                if "max_tokens" not in kwargs["sampling_params"]:
                    raise RuntimeError("host")
                await asyncio.sleep(0.05)
                finished.append(request_id)
                return await super().generate(request_id, **kwargs)

        seed = PrefixRequest(40, [{"role": "user", "content": "1 2 3=6:"}], {0: 2, 1: 3}, "keep")
        with pytest.raises(RuntimeError, match="host"):
            run(Engine(), **{REQUESTS_KEY: PromptRequests(requests={0: [seed]})})
        assert len(finished) == 2


LONG = "3 5 7=22:" * 3


def test_a_prompt_that_is_too_long_is_lost_with_the_key_in_its_error(run: Any) -> None:
    """verl itself would cut off its beginning, and say so in a worker's log only."""
    engine = FakeEngine()
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens, more than data\.max_prompt_length=16;"):
        run(engine, content=LONG)
    assert engine.requests == []


def test_a_prompt_that_is_too_long_is_cut_if_that_was_asked_for(run: Any) -> None:
    engine = FakeEngine()
    assert len(run(engine, data={"truncation": "left"}, content=LONG).prompt_ids) == 16
    assert [len(request.prompt_ids) for request in engine.requests] == [16]


class WithAdapters(FakeEngine):
    """Answers with the version and a token of the adapter that was asked for; that of version 2 it has not got."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters: list[Adapter | None] = []

    async def generate(self, request_id: str, *, adapter: Adapter | None = None, **kwargs: Any) -> TokenOutput:
        output = await super().generate(request_id, **kwargs)
        self.adapters.append(adapter)
        if adapter is not None:
            if adapter.version == 2:
                raise RuntimeError("version 2 is gone")
            output.token_ids = [6] * len(output.token_ids)
            output.extra_fields = {"global_steps": adapter.version}
        return output


class TestLatePrefixes:
    """Sampled by a past adapter as their sample begins."""

    def late(self, version: int, candidates: int = 1) -> PromptRequests:
        messages = [{"role": "user", "content": "3 5 7=22:"}]
        adapter = Adapter(version, f"past/version_{version}")
        return PromptRequests(late={0: PrefixRequest(4, messages, {0: 3}, "keep", candidates, adapter=adapter)})

    def test_the_past_version_begins_and_the_current_one_goes_on(self, run: Any) -> None:
        engine, orders = WithAdapters(), self.late(4)
        output = run(engine, **{REQUESTS_KEY: orders})
        past, current = engine.requests
        assert engine.adapters == [Adapter(4, "past/version_4"), None]
        assert current.prompt_ids == past.prompt_ids + [6] * 3
        assert current.sampling_params == {**SAMPLING, "max_tokens": RESPONSE_LENGTH - 3}
        assert {**past.sampling_params, "max_tokens": 0} == {**SAMPLING, "max_tokens": 0}
        assert output.response_ids == [6] * 3 + [5] * 5
        assert output.policy_versions == [4] * 3 + [VERSION] * 5
        [counted] = output.as_dict()["extra_fields"][SAMPLED_KEY]
        assert (counted["ordinal"], counted["slot"], counted["answers"]) == (4, 0, 1)
        assert orders == PromptRequests()  # nothing is stored with the samples
        assert engine.acquired == engine.released == 1

    def test_only_its_sample_has_it(self, run: Any) -> None:
        engine = WithAdapters()
        output = run(engine, session_id=1, **{REQUESTS_KEY: self.late(4)})
        assert engine.adapters == [None]
        assert output.policy_versions == [VERSION] * RESPONSE_LENGTH

    def test_candidates_all_come_from_the_past_version(self, run: Any) -> None:
        engine = WithAdapters()
        run(engine, **{REQUESTS_KEY: self.late(4, candidates=3)})
        assert [adapter and adapter.version for adapter in engine.adapters] == [4, 4, 4, None]

    def test_a_prefix_that_never_came_leaves_a_pure_sample(self, run: Any) -> None:
        """The trainer asks the engine why, and ends the run if an adapter was missing."""
        output = run(WithAdapters(), **{REQUESTS_KEY: self.late(2)})
        assert output.policy_versions == [VERSION] * RESPONSE_LENGTH
        assert output.as_dict()["extra_fields"][SAMPLED_KEY] == []
