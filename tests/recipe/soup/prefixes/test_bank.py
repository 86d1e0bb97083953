"""Prefixes and their bank."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.prefixes.prefix import Prefix, tokens_to_ask_for
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, SampledPrefix


def make_prefix(length: int, version: int = 0) -> Prefix:
    return Prefix(np.arange(length, dtype=np.int32), -np.ones(length, dtype=np.float32), ((version, length),))


class TestFromSampled:
    def test_engine_went_on(self) -> None:
        prefix = Prefix.from_sampled([5, 6, 7, 8], [-1.0, -2.0, -3.0, -4.0], [(2, 4)], length=3, on_eos="keep")
        assert prefix.token_ids.tolist() == [5, 6, 7]
        assert prefix.log_probs.tolist() == [-1.0, -2.0, -3.0]
        assert (prefix.versions, prefix.complete) == ([2, 2, 2], False)

    @pytest.mark.parametrize("sampled", [1, 2, 3])
    def test_engine_stopped_at_or_before_the_length(self, sampled: int) -> None:
        ids, log_probs = list(range(sampled)), [-0.5] * sampled
        kept = Prefix.from_sampled(ids, log_probs, [(0, sampled)], length=3, on_eos="keep")
        assert kept.token_ids.tolist() == ids
        assert kept.complete
        cut = Prefix.from_sampled(ids, log_probs, [(0, sampled)], length=3, on_eos="cut")
        assert cut.token_ids.tolist() == ids[:-1]
        assert not cut.complete

    @pytest.mark.parametrize(
        ("length", "runs"), [(1, ((4, 1),)), (2, ((4, 2),)), (3, ((4, 2), (6, 1))), (5, ((4, 2), (6, 2), (7, 1)))]
    )
    def test_weights_that_changed_meanwhile(self, length: int, runs: tuple[tuple[int, int], ...]) -> None:
        sampled = [(4, 2), (6, 2), (7, 2)]
        prefix = Prefix.from_sampled(list(range(6)), [-1.0] * 6, sampled, length, on_eos="keep")
        assert prefix.version_spans == runs
        assert (len(prefix), prefix.oldest, prefix.newest) == (length, 4, runs[-1][0])

    @pytest.mark.parametrize("on_eos", ["keep", "cut"])
    def test_keeping_the_end_is_unbiased_and_cutting_it_is_not(self, on_eos: str) -> None:
        """Expected length under the current policy, from mixed samples weighted by the prefix's ratio; enumerated.

        At each token the historical policy ends with probability 0.4 and the current one with 0.2; at most 5 tokens.
        """
        end = {"historical": 0.4, "current": 0.2}
        limit, length = 5, 2

        def sequences(policy: str, most: int) -> list[tuple[int, float]]:
            """(tokens, probability) of every response of at most `most` tokens."""
            stopped = [(n, end[policy] * (1 - end[policy]) ** (n - 1)) for n in range(1, most)]
            return [*stopped, (most, (1 - end[policy]) ** (most - 1))]

        truth = sum(n * p for n, p in sequences("current", limit))
        estimate = 0.0
        ratio = {True: end["current"] / end["historical"], False: (1 - end["current"]) / (1 - end["historical"])}
        for ends_at in [1, 2, None]:
            sampled = length + 1 if ends_at is None else ends_at
            probability = math.prod(
                end["historical"] if token == ends_at else 1 - end["historical"]
                for token in range(1, min(sampled, length) + 1)
            )
            prefix = Prefix.from_sampled([0] * sampled, [0.0] * sampled, [(0, sampled)], length, on_eos)
            weight = math.prod(ratio[prefix.complete and token == len(prefix)] for token in range(1, len(prefix) + 1))
            rest = [(0, 1.0)] if prefix.complete else sequences("current", limit - len(prefix))
            estimate += sum(probability * weight * p * (len(prefix) + n) for n, p in rest)
        if on_eos == "keep":
            assert estimate == pytest.approx(truth)
        else:
            assert abs(estimate - truth) > 0.1


class TestFromResponse:
    """What replay keeps of a finished response, whose tokens may come from several policies."""

    RESPONSE = np.arange(5), -np.arange(5.0), np.array([3, 3, 7, 7, 7])

    def test_every_token_keeps_its_version(self) -> None:
        prefix = Prefix.from_response(*self.RESPONSE, length=3, on_eos="keep")
        assert prefix.token_ids.tolist() == [0, 1, 2]
        assert prefix.log_probs.tolist() == [0.0, -1.0, -2.0]
        assert prefix.version_spans == ((3, 2), (7, 1))
        assert (prefix.versions, prefix.oldest, prefix.newest) == ([3, 3, 7], 3, 7)
        assert not prefix.complete

    @pytest.mark.parametrize("length", [5, 6, 24])
    def test_a_response_that_is_not_longer_is_taken_whole(self, length: int) -> None:
        kept = Prefix.from_response(*self.RESPONSE, length=length, on_eos="keep")
        assert (kept.versions, kept.complete) == ([3, 3, 7, 7, 7], True)
        cut = Prefix.from_response(*self.RESPONSE, length=length, on_eos="cut")
        assert (cut.versions, cut.complete) == ([3, 3, 7, 7], False)

    def test_it_does_not_hold_on_to_the_response(self) -> None:
        response = np.arange(1000, dtype=np.int32), np.zeros(1000, np.float32), np.zeros(1000, np.int64)
        prefix = Prefix.from_response(*response, length=3, on_eos="keep")
        assert prefix.token_ids.base is None
        assert prefix.log_probs.base is None


def test_surprise_is_the_mean_of_minus_log_prob() -> None:
    ids, log_probs = np.arange(2, dtype=np.int32), np.array([-0.5, -1.5], np.float32)
    assert Prefix(ids, log_probs, ((0, 2),)).surprise == 1.0
    assert make_prefix(0).surprise == 0.0


def test_one_token_more_than_the_prefix_is_asked_for_unless_the_whole_response_is_wanted() -> None:
    assert [tokens_to_ask_for(length, 8) for length in (1, 7, 8)] == [2, 8, 8]


class TestBank:
    def test_take_removes(self) -> None:
        bank = PrefixBank()
        bank.put(3, 0, make_prefix(4))
        bank.put(3, 2, make_prefix(5))
        assert bank.slots(3) == {0, 2}
        assert set(bank.take(3)) == {0, 2}
        assert bank.take(3) == {}
        assert len(bank) == 0

    def test_eight_bytes_a_token(self) -> None:
        bank = PrefixBank()
        for ordinal in range(10):
            bank.put(ordinal, 0, make_prefix(50))
            bank.put(ordinal, 0, make_prefix(100))  # in place of the other one
        assert bank.nbytes == 8 * 1000
        bank.take(3)
        assert (bank.nbytes, len(bank)) == (8 * 900, 9)

    @settings(deadline=None)
    @given(lengths=st.lists(st.integers(0, 9), max_size=12))
    def test_survives_a_checkpoint(self, lengths: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("bank") / "bank.npz"
        bank = PrefixBank()
        for slot, length in enumerate(lengths):
            ids, log_probs, versions = np.arange(length), np.full(length, -0.25), np.arange(length) // 2 + slot
            bank.put(slot // 3, slot, Prefix.from_response(ids, log_probs, versions, length=4, on_eos="keep"))
        bank.save(path, {}, next_ordinal=7, fingerprints={7: 123, 8: 456})
        loaded, next_ordinal, fingerprints = PrefixBank.load(path)
        assert next_ordinal == 7
        assert fingerprints == {7: 123, 8: 456}
        assert len(loaded) == len(bank)
        for ordinal in range(5):
            before, after = bank.take(ordinal), loaded.take(ordinal)
            assert before.keys() == after.keys()
            for slot in before:
                assert before[slot].token_ids.tolist() == after[slot].token_ids.tolist()
                assert before[slot].log_probs.tolist() == after[slot].log_probs.tolist()
                assert after[slot].token_ids.dtype == np.int32
                assert (before[slot].version_spans, before[slot].complete) == (
                    after[slot].version_spans,
                    after[slot].complete,
                )

    def test_file_holds_no_pickles(self, tmp_path: Path) -> None:
        bank = PrefixBank()
        bank.put(0, 0, make_prefix(3))
        bank.save(tmp_path / "bank.npz", {}, next_ordinal=0, fingerprints={})
        with np.load(tmp_path / "bank.npz", allow_pickle=False) as arrays:
            assert all(arrays[name].dtype != object for name in arrays)


class TestRequests:
    def test_every_sample_takes_its_own_and_nothing_is_left(self) -> None:
        request = PrefixRequest(9, [], {0: 3}, "keep")
        riding = PromptRequests(prefixes={0: make_prefix(2)}, requests={1: [request]})
        prefix, requests = riding.take(0)
        assert prefix is not None
        assert requests == []
        assert riding.take(1) == (None, [request])
        assert riding == PromptRequests()

    @staticmethod
    def answer(log_probs: list[float], **extra: Any) -> SimpleNamespace:
        return SimpleNamespace(
            token_ids=list(range(len(log_probs))), log_probs=log_probs, extra_fields={"global_steps": 3, **extra}
        )

    def test_of_several_answers_the_most_surprising_prefix_is_taken(self) -> None:
        answers = [self.answer([-1.0, -1.0, -9.0]), self.answer([-2.0, -1.5, 0.0]), self.answer([-0.1])]
        sampled = SampledPrefix.from_answers(PrefixRequest(9, [], {1: 2}, "keep", candidates=3), 1, 2, answers, [7, 8])
        assert sampled.prefix.log_probs.tolist() == [-2.0, -1.5]  # the token behind the prefix does not count
        assert (sampled.ordinal, sampled.slot, sampled.prefix.version_spans, sampled.ended) == (9, 1, ((3, 2),), False)
        assert (sampled.sampled, sampled.answers, sampled.prompt_ids) == (7, 3, [7, 8])
        ended = SampledPrefix.from_answers(
            PrefixRequest(9, [], {1: 2}, "keep"), 1, 2, [answers[2], self.answer([0.0] * 3)]
        )
        assert (ended.ended, ended.prefix.complete, ended.answers) == (True, True, 2)

    def test_runs_of_versions_go_before_the_last_version(self) -> None:
        answer = self.answer([-1.0] * 4, policy_runs=[(1, 2), (3, 2)])
        assert SampledPrefix.from_answers(
            PrefixRequest(9, [], {0: 3}, "keep"), 0, 3, [answer]
        ).prefix.version_spans == ((1, 2), (3, 1))

    def test_a_sampled_prefix_travels_as_a_dictionary_and_is_copied_out(self) -> None:
        buffer = np.arange(100, dtype=np.int32)
        packed = SampledPrefix(
            ordinal=4,
            slot=1,
            prefix=Prefix(buffer[:3], np.zeros(3, np.float32), ((5, 1), (6, 2)), True),
            sampled=3,
            ended=True,
            answers=2,
            prompt_ids=[7, 8],
        ).pack()
        assert not any(isinstance(value, Prefix) for value in packed.values())
        packed["prefix"]["version_spans"] = [
            list(run) for run in packed["prefix"]["version_spans"]
        ]  # what msgpack makes of tuples
        sampled = SampledPrefix.unpack(packed)
        assert (sampled.ordinal, sampled.slot, sampled.prefix.versions, sampled.prefix.complete) == (
            4,
            1,
            [5, 6, 6],
            True,
        )
        assert (sampled.sampled, sampled.ended, sampled.answers, sampled.prompt_ids) == (3, True, 2, [7, 8])
        assert sampled.prefix.token_ids.base is None
