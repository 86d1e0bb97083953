"""Replay: what a prompt's visit leaves for its next one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipe.soup.prefixes.finished import FinishedSample, fingerprint
from recipe.soup.prefixes.replay import ReplaySource
from recipe.soup.prefixes.source import RunFacts
from recipe.soup.settings import PrefixLengthSettings, ScheduleSettings, SoupSettings

PROMPTS, SAMPLES, RESPONSE_LENGTH = 6, 4, 8


class Run:
    """Epochs over six prompts, three a step; every response has five tokens of the step's version.

    Args:
        reward, log_prob: of each sample, given step and sample.
    """

    def __init__(
        self,
        length: PrefixLengthSettings,
        on_eos: Any = "keep",
        share: float = 0.5,
        reward: Callable[[int, int], float] = lambda step, sample: 0.0,
        log_prob: Callable[[int, int], float] = lambda step, sample: -1.0,
        **settings: Any,
    ) -> None:
        self.fetched = 0
        self.reward, self.log_prob = reward, log_prob
        soup = SoupSettings(source="replay", mixed_share=share, prefix_length=length, on_eos=on_eos, **settings)
        self.source = ReplaySource(soup, RunFacts(SAMPLES, RESPONSE_LENGTH, 0, 3, 100), self.fetch)

    def fetch(self) -> tuple[None, list[Any], int]:
        first, self.fetched = self.fetched, self.fetched + 3
        return None, [[{"role": "user", "content": str(i % PROMPTS)}] for i in range(first, self.fetched)], first

    def step(self, step: int) -> list[dict[int, Any]]:
        chunk, prefixes = self.source.take(step)
        samples = []
        for row, slots in enumerate(prefixes):
            for sample in range(SAMPLES):
                prefix = slots.get(sample)
                versions = [] if prefix is None else prefix.versions
                versions = np.array(versions + [step - 1] * max(5 - len(versions), 0))
                ids = np.full(len(versions), 100 * step + 10 * row + sample)
                ordinal = chunk.first_ordinal + row
                log_probs = np.full(len(versions), self.log_prob(step, sample))
                reward = self.reward(step, sample)
                samples.append(
                    FinishedSample(fingerprint(chunk.messages[row]), ordinal, ids, log_probs, versions, reward)
                )
        self.source.keep(samples)
        return prefixes


def test_the_first_visit_mixes_nothing_and_the_next_one_what_it_left() -> None:
    run = Run(PrefixLengthSettings(distribution="fixed", min=1, max=3))
    assert run.step(1) == run.step(2) == [{}, {}, {}]
    for row, slots in enumerate(run.step(3)):
        assert set(slots) == {0, 1}  # half of four samples
        for prefix in slots.values():
            assert prefix.versions == [0, 0, 0]
            assert prefix.token_ids[0] // 10 == 10 + row  # of the same prompt, at step 1
            assert not prefix.complete


def test_a_mixed_response_that_is_replayed_again_keeps_every_tokens_version() -> None:
    run = Run(PrefixLengthSettings(distribution="fixed", min=1, max=4), share=1.0)
    for step in range(1, 5):
        run.step(step)
    versions = {tuple(prefix.versions) for slots in run.step(5) for prefix in slots.values()}
    assert versions == {(0, 0, 0, 0)}
    run = Run(PrefixLengthSettings(distribution="uniform", min=1, max=4), share=1.0)
    seen = {tuple(p.versions) for step in range(1, 30) for slots in run.step(step) for p in slots.values()}
    assert any(len(set(versions)) >= 3 for versions in seen)


def test_which_responses_are_kept_is_drawn_anew_at_each_visit() -> None:
    run = Run(PrefixLengthSettings(distribution="fixed", min=1, max=2))
    drawn = {p.token_ids[0] % 10 for step in range(1, 20) for slots in run.step(step) for p in slots.values()}
    assert drawn == set(range(SAMPLES))


def kept(run: Run, visits: int = 1) -> list[list[int]]:
    """For each prompt of the first three and each of its visits from the second on: whose response its samples got."""
    seen = []
    for step in range(1, 2 * visits + 2):
        prefixes = run.step(step)
        if step % 2 and step > 1:
            assert all(sorted(slots) == list(range(len(slots))) for slots in prefixes)
            seen += [[slots[slot].token_ids[0] % 10 for slot in sorted(slots)] for slots in prefixes]
    return seen


LENGTH = PrefixLengthSettings(distribution="fixed", min=1, max=3)


class TestSelection:
    def test_failed_responses_only(self) -> None:
        # -1 is what graders give for a wrong format.
        run = Run(LENGTH, selection="failed", reward=lambda step, sample: [1.0, 0.0, 0.5, -1.0][sample])
        seen = kept(run, visits=4)
        assert {tuple(sorted(samples)) for samples in seen} == {(1, 3)}
        assert len({tuple(samples) for samples in seen}) == 2  # in any order

    def test_successful_responses_only(self) -> None:
        run = Run(LENGTH, selection="successful", reward=lambda step, sample: [1.0, 0.0, 0.5, -1.0][sample])
        assert {tuple(sorted(samples)) for samples in kept(run, visits=4)} == {(0, 2)}

    def test_of_more_than_are_asked_for_some_are_drawn(self) -> None:
        run = Run(LENGTH, selection="failed", reward=lambda step, sample: float(sample == 3))
        seen = kept(run, visits=8)
        assert {sample for samples in seen for sample in samples} == {0, 1, 2}
        assert all(len(set(samples)) == 2 for samples in seen)

    @pytest.mark.parametrize(("selection", "rewards"), [("failed", [1, 1, 0, 1]), ("successful", [0, 0, 1, 0])])
    def test_fewer_than_are_asked_for_leave_samples_unmixed(self, selection: str, rewards: list[float]) -> None:
        run = Run(LENGTH, selection=selection, share=1.0, reward=lambda step, sample: rewards[sample])
        assert kept(run) == [[2]] * 3

    @pytest.mark.parametrize(("selection", "reward"), [("failed", 1.0), ("successful", 0.0)])
    def test_none_leaves_the_next_visit_unmixed(self, selection: str, reward: float) -> None:
        assert kept(Run(LENGTH, selection=selection, reward=lambda step, sample: reward)) == [[]] * 3

    def test_a_visit_without_any_does_not_leave_what_the_one_before_it_left(self) -> None:
        """Two visits before the next one takes anything: a prompt that is in a step twice, or in flight."""
        run = Run(LENGTH, selection="successful")
        response = np.zeros(5, np.int32), np.zeros(5, np.float32), np.zeros(5, np.int64)
        for ordinal, reward in ((0, 1.0), (6, 0.0)):
            run.source.keep([FinishedSample(fingerprint("prompt"), ordinal, *response, reward)] * SAMPLES)
            assert len(run.source.bank) == 2 * reward

    def test_the_most_surprising_responses_come_first(self) -> None:
        run = Run(LENGTH, selection="entropic", log_prob=lambda step, sample: [-1.0, -0.2, -3.0, -2.0][sample])
        assert kept(run, visits=3) == [[2, 3]] * 9

    def test_the_most_probable_successes_come_first(self) -> None:
        run = Run(
            LENGTH,
            selection="certain",
            reward=lambda step, sample: [1.0, 0.0, 0.5, 1.0][sample],
            log_prob=lambda step, sample: [-3.0, -0.1, -0.2, -1.0][sample],
        )
        assert kept(run, visits=3) == [[2, 3]] * 9

    @pytest.mark.parametrize("solved", [0.0, 1.0])
    def test_where_all_samples_or_none_are_solved_nothing_is_certain(self, solved: float) -> None:
        assert kept(Run(LENGTH, selection="certain", reward=lambda step, sample: solved)) == [[]] * 3

    def test_samples_share_a_response(self) -> None:
        run = Run(LENGTH, share=1.0, samples_per_prefix=2)
        assert all(a == b and c == d and a != c for a, b, c, d in kept(run, visits=3))

    def test_a_resumed_run_needs_no_rewards_of_the_past(self, tmp_path: Path) -> None:
        run = Run(LENGTH, selection="successful", reward=lambda step, sample: float(sample == 2))
        run.step(1)
        run.step(2)
        run.source.save(tmp_path)
        resumed = Run(LENGTH, selection="successful")
        resumed.source.load(tmp_path)
        resumed.fetched = run.source.resume_state(lambda: run.fetched)
        assert [[p.token_ids[0] % 10 for p in slots.values()] for slots in resumed.step(3)] == [[2]] * 3


def test_a_schedule_takes_the_step_at_which_the_prefix_is_used() -> None:
    """Six prompts, three a step: what step t leaves is used at step t + 2."""
    run = Run(PrefixLengthSettings(distribution="fixed", min=1, max=5), share=1.0)
    run.source.settings.schedules.prefix_length = ScheduleSettings(shape="linear", end=1, steps=5)
    run.source.facts = replace(run.source.facts, prompts_per_epoch=PROMPTS)
    lengths = {step: {len(prefix) for slots in run.step(step) for prefix in slots.values()} for step in range(1, 7)}
    assert lengths == {1: set(), 2: set(), 3: {3}, 4: {2}, 5: {1}, 6: {1}}


def test_whole_is_trajectory_level_mixing() -> None:
    run = Run(PrefixLengthSettings(distribution="whole", min=RESPONSE_LENGTH, max=RESPONSE_LENGTH))
    run.step(1)
    run.step(2)
    prefixes = [prefix for slots in run.step(3) for prefix in slots.values()]
    assert len(prefixes) == 6
    assert all(prefix.complete and len(prefix) == 5 for prefix in prefixes)


@pytest.mark.parametrize("on_eos", ["keep", "cut"])
def test_a_response_shorter_than_the_prefix(on_eos: str) -> None:
    run = Run(PrefixLengthSettings(distribution="fixed", min=1, max=7), on_eos)
    run.step(1)
    run.step(2)
    prefixes = [prefix for slots in run.step(3) for prefix in slots.values()]
    assert all(prefix.complete == (on_eos == "keep") for prefix in prefixes)
    assert all(len(prefix) == (5 if on_eos == "keep" else 4) for prefix in prefixes)


def test_nothing_is_fetched_ahead_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    whole, stopped = (Run(PrefixLengthSettings(distribution="uniform", min=1, max=4)) for _ in range(2))
    expected = [whole.step(step) for step in range(1, 7)]
    for step in range(1, 4):
        stopped.step(step)
        assert stopped.fetched == 3 * step
    stopped.source.save(tmp_path)
    resumed = Run(PrefixLengthSettings(distribution="uniform", min=1, max=4))
    resumed.source.load(tmp_path)
    resumed.fetched = stopped.source.resume_state(lambda: stopped.fetched)
    for step in range(4, 7):
        for slots, wanted in zip(resumed.step(step), expected[step - 1], strict=True):
            assert {s: (p.token_ids.tolist(), p.version_spans) for s, p in slots.items()} == {
                s: (p.token_ids.tolist(), p.version_spans) for s, p in wanted.items()
            }


def test_what_is_older_than_max_age_is_dropped_and_counted_and_nothing_else() -> None:
    """Six prompts, three a step: a prompt's last visit is two steps ago, and replayed tokens may be older."""
    length = PrefixLengthSettings(distribution="uniform", min=1, max=4)
    free, bound = Run(length, share=1.0), Run(length, share=1.0, max_age=3)
    dropped = 0
    for step in range(1, 30):
        used = bound.step(step)
        assert all(step - 1 - prefix.oldest <= 3 for slots in used for prefix in slots.values())
        counted = bound.source.metrics()["soup/cost/too_old"]
        # Four prefixes were kept for each of three prompts; those that are not there were dropped.
        assert counted == (sum(4 - len(slots) for slots in used) if step > 2 else 0)
        dropped += counted
        free.step(step)
    assert dropped > 0
    assert free.source.metrics()["soup/cost/too_old"] == 0


def test_max_age_keeps_what_is_exactly_as_old_and_none_that_is_one_update_older() -> None:
    length = PrefixLengthSettings(distribution="fixed", min=1, max=3)
    for max_age, slots in ((2, {0, 1}), (1, set())):
        run = Run(length, max_age=max_age)
        run.step(1)
        run.step(2)
        assert [set(found) for found in run.step(3)] == [slots] * 3  # sampled by version 0, in a step of version 2
