"""What is drawn for each prompt, and how settings move over training."""

import math
from collections.abc import Callable, Iterable
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from recipe.soup.prefixes.plan import PromptPlan, RunFacts, plan_prompt
from recipe.soup.prefixes.schedules import lag_at, value_at
from recipe.soup.settings import ScheduleSettings, SoupSettings, parse_settings

RESPONSE_LENGTH, LAST_STEP = 24, 40
SHAPES = st.sampled_from(["constant", "linear", "cosine"])


def settings_of(**keys: Any) -> SoupSettings:
    """Settings of a config that passes all checks, as in a run."""
    return parse_settings(OmegaConf.create(keys), RESPONSE_LENGTH)


def facts_of(samples: int = 8, seed: int = 0, prompts_per_step: int = 4) -> RunFacts:
    return RunFacts(samples, RESPONSE_LENGTH, seed, prompts_per_step, LAST_STEP)


def is_likely(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether the chi-square statistic lies within 5 standard deviations of what these probabilities give."""
    expected = counts.sum() * probabilities
    degrees = len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum()) < degrees + 5 * math.sqrt(2 * degrees)


class TestSchedule:
    @pytest.mark.parametrize("step", [1, 7, LAST_STEP])
    def test_constant_stays(self, step: int) -> None:
        assert value_at(ScheduleSettings(), 0.3, step, LAST_STEP) == 0.3

    @settings(deadline=None)
    @given(start=st.floats(0, 100), end=st.floats(0, 100), warmup=st.integers(0, 9), after=st.integers(1, 30))
    def test_linear_goes_straight_to_its_end_and_stays(self, start: float, end: float, warmup: int, after: int) -> None:
        steps = warmup + 1 + after
        schedule = ScheduleSettings(shape="linear", end=end, steps=steps, warmup=warmup)
        values = [value_at(schedule, start, step, LAST_STEP) for step in range(1, steps + 20)]
        line = np.interp(np.arange(1, steps + 20), [0, warmup + 1, steps], [0, start, end])
        assert values == pytest.approx(line.tolist())

    @settings(deadline=None)
    @given(start=st.floats(0, 100), end=st.floats(0, 100), warmup=st.integers(0, 9), after=st.integers(1, 30))
    def test_cosine_is_half_a_wave_to_its_end_and_stays(
        self, start: float, end: float, warmup: int, after: int
    ) -> None:
        steps = warmup + 1 + after
        schedule = ScheduleSettings(shape="cosine", end=end, steps=steps, warmup=warmup)
        for step in range(warmup + 1, steps + 1):
            angle = math.pi * (step - warmup - 1) / after
            wave = (start + end) / 2 + (start - end) / 2 * math.cos(angle)
            assert value_at(schedule, start, step, LAST_STEP) == pytest.approx(wave, abs=1e-9)
        assert value_at(schedule, start, steps + 20, LAST_STEP) == pytest.approx(end)

    @pytest.mark.parametrize("shape", ["linear", "cosine"])
    def test_without_steps_the_end_is_reached_at_the_runs_last_step(self, shape: Any) -> None:
        schedule = ScheduleSettings(shape=shape, end=2.0)
        values = [value_at(schedule, 6.0, step, LAST_STEP) for step in range(1, LAST_STEP + 1)]
        assert values[0] == 6.0
        assert values[-1] == pytest.approx(2.0)
        assert values[-2] > 2.0
        assert all(later < earlier for earlier, later in pairwise(values))

    @pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
    def test_warm_up_rises_evenly_from_nothing(self, shape: Any) -> None:
        schedule = ScheduleSettings(shape=shape, end=None if shape == "constant" else 9.0, warmup=3)
        values = [value_at(schedule, 2.0, step, LAST_STEP) for step in range(1, 5)]
        assert values == pytest.approx([0.5, 1.0, 1.5, 2.0])

    @settings(deadline=None)
    @given(
        shape=SHAPES, start=st.floats(0, 100), end=st.floats(0, 100), steps=st.none() | st.integers(2, 50),
        warmup=st.integers(0, 60), step=st.integers(1, 100),
    )  # fmt: skip
    def test_the_value_never_leaves_the_range(
        self, shape: Any, start: float, end: float, steps: int | None, warmup: int, step: int
    ) -> None:
        schedule = ScheduleSettings(shape=shape, end=None if shape == "constant" else end, steps=steps, warmup=warmup)
        bounds = [start] if shape == "constant" else [start, end]
        low, high = min(bounds + ([0.0] if step <= warmup else [])), max(bounds)
        assert low - 1e-9 <= value_at(schedule, start, step, LAST_STEP) <= high + 1e-9


class TestLag:
    @staticmethod
    def counts(lag: int, distribution: str, draws: int = 20_000) -> np.ndarray:
        settings, rng = settings_of(lag=lag, lag_distribution=distribution), np.random.default_rng(5)
        return np.bincount([lag_at(settings, 1, LAST_STEP, rng) for _ in range(draws)], minlength=lag + 1)

    @pytest.mark.parametrize("lag", [0, 1, 8])
    def test_fixed_is_always_the_lag(self, lag: int) -> None:
        assert self.counts(lag, "fixed", draws=100)[lag] == 100

    @pytest.mark.parametrize("distribution", ["uniform", "geometric"])
    def test_without_a_lag_there_is_nothing_to_draw(self, distribution: str) -> None:
        assert self.counts(0, distribution, draws=100).tolist() == [100]

    @pytest.mark.parametrize("lag", [2, 7, 16])
    def test_uniform_draws_every_lag_from_1_equally(self, lag: int) -> None:
        counts = self.counts(lag, "uniform")
        assert (counts[0], len(counts)) == (0, lag + 1)
        assert is_likely(counts[1:], np.full(lag, 1 / lag))

    @pytest.mark.parametrize("lag", [2, 8, 16])
    def test_geometric_halves_every_quarter_of_the_lag(self, lag: int) -> None:
        decay = 0.5 ** (4 / lag)
        probabilities = (1 - decay) / (1 - decay**lag) * decay ** np.arange(lag)
        if lag >= 4:
            assert probabilities[lag // 4] == pytest.approx(probabilities[0] / 2)
        counts = self.counts(lag, "geometric")
        assert (counts[0], len(counts)) == (0, lag + 1)
        assert is_likely(counts[1:], probabilities)
        assert not is_likely(counts[1:], np.full(lag, 1 / lag))

    def test_a_schedule_moves_the_longest_lag(self) -> None:
        schedules = {"lag": {"shape": "linear", "end": 9, "steps": 9}}
        rng = np.random.default_rng(0)
        fixed = settings_of(lag=1, schedules=schedules)
        assert [lag_at(fixed, step, LAST_STEP, rng) for step in (1, 4, 9, 30)] == [1, 4, 9, 9]
        drawn = settings_of(lag=1, lag_distribution="uniform", schedules=schedules)
        for step, longest in ((1, 1), (4, 4), (30, 9)):
            assert {lag_at(drawn, step, LAST_STEP, rng) for _ in range(500)} == set(range(1, longest + 1))

    @pytest.mark.parametrize("end", [9, 2.7])
    def test_no_lag_is_larger_than_the_largest(self, end: float) -> None:
        settings = settings_of(lag=1, schedules={"lag": {"shape": "linear", "end": end}})
        rng = np.random.default_rng(0)
        assert max(lag_at(settings, step, LAST_STEP, rng) for step in range(1, 60)) == settings.largest_lag


class TestNumberOfPrefixes:
    @settings(deadline=None)
    @given(share=st.floats(0, 1), samples=st.integers(1, 16), seed=st.integers(0, 99), ordinal=st.integers(0, 10**6))
    def test_it_is_the_share_rounded_up_or_down(self, share: float, samples: int, seed: int, ordinal: int) -> None:
        plan = plan_prompt(settings_of(mixed_share=share), facts_of(samples, seed), ordinal, 12.0)
        assert math.floor(share * samples) <= len(plan.lengths) <= math.ceil(share * samples)

    @pytest.mark.parametrize(("share", "per_prefix"), [(0.3, 1), (0.55, 1), (0.3, 2), (0.9, 4), (0.05, 8)])
    def test_the_share_is_met_on_average(self, share: float, per_prefix: int) -> None:
        settings = settings_of(mixed_share=share, samples_per_prefix=per_prefix)
        mixed = [per_prefix * len(plan_prompt(settings, facts_of(), n, 12.0).lengths) for n in range(4000)]
        # Each is one of two neighbours: its standard deviation is at most half of what lies between them.
        assert np.mean(mixed) == pytest.approx(8 * share, abs=5 * per_prefix / 2 / math.sqrt(4000))

    @settings(deadline=None)
    @given(share=st.floats(0, 1), per_prefix=st.integers(1, 5), groups=st.integers(1, 5), ordinal=st.integers(0, 10**6))
    def test_shared_prefixes_never_need_more_samples_than_there_are(
        self, share: float, per_prefix: int, groups: int, ordinal: int
    ) -> None:
        settings = settings_of(mixed_share=share, samples_per_prefix=per_prefix)
        plan = plan_prompt(settings, facts_of(per_prefix * groups), ordinal, 12.0)
        assert len(plan.lengths) * per_prefix <= per_prefix * groups
        assert math.floor(share * groups) <= len(plan.lengths) <= math.ceil(share * groups)


DRAWN = {"lag_distribution": "uniform", "mixed_share": 0.7}


class TestSameDraw:
    def test_a_plan_depends_on_seed_and_place_only(self) -> None:
        settings, again = settings_of(**DRAWN), settings_of(**DRAWN)
        plans = {n: plan_prompt(settings, facts_of(), n, 12.0) for n in range(50)}
        assert {n: plan_prompt(again, facts_of(), n, 3.0) for n in reversed(range(50))} == plans
        assert {n: plan_prompt(settings, facts_of(seed=1), n, 12.0) for n in plans} != plans
        assert len({(tuple(plan.lengths), plan.steps_ahead) for plan in plans.values()}) > 40

    def test_how_long_responses_are_does_not_change_the_lag(self) -> None:
        settings = settings_of(**DRAWN, prefix_length={"unit": "fraction"})
        lags = [
            {plan_prompt(settings, facts_of(), n, length).steps_ahead for length in (2.0, 12.0, 20.0)}
            for n in range(50)
        ]
        assert all(len(same) == 1 for same in lags)


class TestLengths:
    @settings(deadline=None)
    @given(
        distribution=st.sampled_from(["uniform", "fixed", "beta"]),
        low=st.integers(1, RESPONSE_LENGTH - 1),
        high=st.integers(1, RESPONSE_LENGTH - 1),
        ordinal=st.integers(0, 10**6),
        typical=st.floats(1, RESPONSE_LENGTH),
    )
    def test_tokens(self, distribution: str, low: int, high: int, ordinal: int, typical: float) -> None:
        assume(low <= high)
        length = {"distribution": distribution, "min": low, "max": high}
        settings = settings_of(mixed_share=1.0, prefix_length=length)
        lengths = plan_prompt(settings, facts_of(), ordinal, typical).lengths
        assert all(type(n) is int and (n == high if distribution == "fixed" else low <= n <= high) for n in lengths)

    @settings(deadline=None)
    @given(
        distribution=st.sampled_from(["uniform", "fixed", "beta"]),
        low=st.floats(0, 1),
        high=st.floats(0.001, 1),
        ordinal=st.integers(0, 10**6),
        typical=st.floats(1, RESPONSE_LENGTH),
    )
    def test_fractions(self, distribution: str, low: float, high: float, ordinal: int, typical: float) -> None:
        assume(low <= high)
        length = {"distribution": distribution, "unit": "fraction", "min": low, "max": high}
        settings = settings_of(mixed_share=1.0, prefix_length=length)
        shortest, longest = np.clip(np.rint(np.array([low, high]) * typical), 1, RESPONSE_LENGTH - 1).tolist()
        lengths = plan_prompt(settings, facts_of(), ordinal, typical).lengths
        assert all(shortest <= n <= longest for n in lengths)
        assert distribution != "fixed" or lengths == [longest] * 8

    @settings(deadline=None)
    @given(ordinal=st.integers(0, 10**6), typical=st.floats(1, RESPONSE_LENGTH), unit=st.sampled_from(["tokens", None]))
    def test_whole(self, ordinal: int, typical: float, unit: str | None) -> None:
        length = {"distribution": "whole", "unit": unit or "fraction"}
        settings = settings_of(source="replay", mixed_share=1.0, prefix_length=length)
        assert plan_prompt(settings, facts_of(), ordinal, typical).lengths == [RESPONSE_LENGTH] * 8

    @staticmethod
    def drawn(typical: float = 12.0, **length: Any) -> np.ndarray:
        settings = settings_of(mixed_share=1.0, prefix_length=length)
        plans = (plan_prompt(settings, facts_of(), n, typical).lengths for n in range(1000))
        return np.array(list(chain.from_iterable(plans)))

    def test_uniform_draws_every_length_equally(self) -> None:
        counts = np.bincount(self.drawn(min=2, max=5), minlength=6)
        assert counts[:2].sum() == 0
        assert is_likely(counts[2:], np.full(4, 1 / 4))

    @pytest.mark.parametrize("typical", [4.0, 12.0, 24.0])
    def test_a_fraction_follows_the_typical_length(self, typical: float) -> None:
        assert set(self.drawn(typical, distribution="fixed", unit="fraction", max=0.5)) == {typical / 2}
        uniform = self.drawn(typical, unit="fraction", min=0.5, max=0.75)
        assert (uniform.min(), uniform.max()) == (typical / 2, typical * 3 / 4)

    def test_a_fraction_leaves_the_current_policy_one_token(self) -> None:
        lengths = self.drawn(RESPONSE_LENGTH, distribution="fixed", unit="fraction", max=1.0)
        assert set(lengths) == {RESPONSE_LENGTH - 1}

    @pytest.mark.parametrize(("alpha", "beta"), [(2.0, 2.0), (1.0, 4.0), (6.0, 2.0)])
    def test_beta_is_stretched_from_min_to_max(self, alpha: float, beta: float) -> None:
        lengths = self.drawn(distribution="beta", min=3, max=23, alpha=alpha, beta=beta)
        shares = (lengths - 3) / 20
        share, total = alpha / (alpha + beta), alpha + beta
        variance = share * (1 - share) / (total + 1)
        assert shares.mean() == pytest.approx(share, abs=5 * math.sqrt(variance / len(shares)) + 0.002)
        assert shares.var() == pytest.approx(variance, rel=0.1)


class TestSchedules:
    """Step s has the prompts 4(s-1) to 4s-1."""

    @staticmethod
    def by_step(settings: SoupSettings, what: Callable[[PromptPlan], Iterable[int]]) -> list[set[int]]:
        """What each step's prompts have."""
        plans = [plan_prompt(settings, facts_of(), n, 12.0) for n in range(4 * LAST_STEP)]
        return [set(chain.from_iterable(map(what, plans[at : at + 4]))) for at in range(0, len(plans), 4)]

    def counts(self, settings: SoupSettings) -> list[set[int]]:
        return self.by_step(settings, lambda plan: [len(plan.lengths)])

    def lengths(self, settings: SoupSettings) -> list[set[int]]:
        return self.by_step(settings, lambda plan: plan.lengths)

    def lags(self, settings: SoupSettings) -> list[set[int]]:
        return self.by_step(settings, lambda plan: [plan.steps_ahead])

    def test_the_share_of_mixed_samples(self) -> None:
        schedule = {"shape": "linear", "end": 1.0, "steps": 9}
        settings = settings_of(mixed_share=0.0, schedules={"mixed_share": schedule})
        # 8 samples, 8 steps from nothing to all: one sample more each step.
        assert self.counts(settings) == [{min(step - 1, 8)} for step in range(1, LAST_STEP + 1)]

    def test_the_share_falls_by_cosine(self) -> None:
        schedule = {"shape": "cosine", "end": 0.0, "steps": 21}
        counts = self.counts(settings_of(mixed_share=1.0, schedules={"mixed_share": schedule}))
        assert (counts[0], counts[10], counts[20], counts[-1]) == ({8}, {4}, {0}, {0})

    def test_the_longest_prefix(self) -> None:
        length = {"distribution": "fixed", "max": 4}
        schedules = {"prefix_length": {"shape": "linear", "end": 20, "steps": 17}}
        settings = settings_of(mixed_share=1.0, prefix_length=length, schedules=schedules)
        assert self.lengths(settings) == [{min(3 + step, 20)} for step in range(1, LAST_STEP + 1)]

    def test_the_longest_prefix_as_a_fraction(self) -> None:
        length = {"distribution": "fixed", "unit": "fraction", "max": 1.0}
        schedules = {"prefix_length": {"shape": "linear", "end": 0.0, "steps": 13}}
        settings = settings_of(mixed_share=1.0, prefix_length=length, schedules=schedules)
        assert self.lengths(settings) == [{max(13 - step, 1)} for step in range(1, LAST_STEP + 1)]

    def test_a_longest_prefix_that_falls_below_the_shortest_takes_it_along(self) -> None:
        schedules = {"prefix_length": {"shape": "linear", "end": 2, "steps": 9}}
        settings = settings_of(mixed_share=1.0, prefix_length={"min": 6, "max": 10}, schedules=schedules)
        lengths = self.lengths(settings)
        assert [(min(some), max(some)) for some in lengths[4:10]] == [(6, 6), (5, 5), (4, 4), (3, 3), (2, 2), (2, 2)]

    @pytest.mark.parametrize("schedule", [{"shape": "linear", "end": 3}, {"warmup": 5}])
    def test_whole_stays_whole_or_is_refused(self, schedule: dict[str, Any]) -> None:
        try:
            settings = settings_of(
                source="replay", prefix_length={"distribution": "whole"}, schedules={"prefix_length": schedule}
            )
        except SystemExit:
            return
        assert set.union(*self.lengths(settings)) == {RESPONSE_LENGTH}

    def test_the_lag_with_a_warm_up(self) -> None:
        schedules = {"lag": {"shape": "linear", "end": 0, "steps": 12, "warmup": 3}}
        lags = self.lags(settings_of(lag=8, schedules=schedules))
        assert lags[:12] == [{lag} for lag in (2, 4, 6, 8, 7, 6, 5, 4, 3, 2, 1, 0)]
        assert set.union(*lags[12:]) == {0}
