"""Verified replay: what is kept of a visit, how it is verified between two steps, and what a checkpoint has of it."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.soup.prefixes.finished import FinishedSample, fingerprint
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.requests import SampledPrefix
from recipe.soup.prefixes.verification import accepted
from recipe.soup.prefixes.verified import LENGTH, NO_DISTRIBUTION, OTHER_LENGTH, VerifiedSource
from recipe.soup.settings import SoupSettings
from recipe.soup.settings.verification import VerificationSettings

PROMPTS, PER_STEP, SAMPLES, LONGEST, END = 6, 3, 4, 5, 2
Shift = Callable[[int], float]


class Policy:
    """Scores that are `shift` nats off what was recorded, or of the same distribution at every place."""

    eos_token_id = END

    def __init__(self, shift: float = 0.0, distribution: Sequence[float] = (0.5, 0.3, 0.2)) -> None:
        self.shift, self.distribution, self.asked = shift, np.log(distribution), list[list[SampledPrefix]]()

    def log_probs(self, responses: Sequence[SampledPrefix]) -> list[np.ndarray]:
        self.asked.append(list(responses))
        return [response.prefix.log_probs + self.shift for response in responses]

    def distributions(self, responses: Sequence[SampledPrefix]) -> list[np.ndarray]:
        self.asked.append(list(responses))
        return [np.tile(self.distribution, (len(response.prefix), 1)) for response in responses]


class Run:
    """Epochs over six prompts, three a step; responses have five tokens, of which the first tells whose they are."""

    def __init__(self, scores: Policy, longest: int = LONGEST, verification: Any = None, **settings: Any) -> None:
        self.fetched = 0
        keys = {"mixed_share": 1.0, "verification": VerificationSettings(**(verification or {})), **settings}
        soup = SoupSettings(source="replay", selection="verified", **keys)
        soup.fill(longest)
        self.scores = scores
        self.source = VerifiedSource(soup, RunFacts(SAMPLES, longest, 0, PER_STEP, 100), self.fetch, scores)

    def fetch(self) -> tuple[None, list[Any], int]:
        first, self.fetched = self.fetched, self.fetched + PER_STEP
        return None, [[{"role": "user", "content": str(i % PROMPTS)}] for i in range(first, self.fetched)], first

    def step(self, step: int, updates: bool = True) -> list[dict[int, Prefix]]:
        chunk, prefixes = self.source.take(step)
        samples = []
        for row, messages in enumerate(chunk.messages):
            for sample in range(SAMPLES):
                ids = np.array([100 * step + 10 * row + sample, 0, 1, 0, 1])
                samples.append(
                    FinishedSample(
                        fingerprint(messages), chunk.first_ordinal + row, ids, np.full(5, -1.0), np.full(5, step - 1),
                        0.0, prompt_ids=np.array([7, 8, row]),
                    )
                )  # fmt: skip
        self.source.keep(samples)
        if updates:
            self.source.updated(step)
        return prefixes


# ---------------------------------------------------------------- the rule


@given(
    st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0), st.floats(0, 1, exclude_max=True)), max_size=8),
    st.floats(0.1, 9),
)
def test_the_first_token_with_u_above_min_1_and_l_pi_over_mu_ends_it(
    tokens: list[tuple[float, float, float]], leniency: float
) -> None:
    expected = 0
    for now, then, draw in tokens:
        if draw > min(1.0, leniency * float(np.exp(np.float64(now) - np.float64(then)))):
            break
        expected += 1
    now, then, draws = (np.array([token[i] for token in tokens]) for i in range(3))
    assert accepted(now, then, leniency, draws) == expected


def test_no_limit_keeps_what_the_policy_would_never_say() -> None:
    assert accepted(np.array([-1e4]), np.array([-1.0]), np.inf, np.array([0.99])) == 1
    assert accepted(np.array([-1.0]), np.array([-1.0]), 1.0, np.array([0.0])) == 1


def test_a_log_prob_that_is_no_number_keeps_nothing() -> None:
    now, then, draws = np.array([-1.0, np.nan, -1.0]), np.full(3, -1.0), np.full(3, 0.5)
    for leniency in (1.0, np.inf):
        assert accepted(now, then, leniency, draws) == 1
        assert accepted(now[1:], then[1:], leniency, draws[1:]) == 0


# ---------------------------------------------------------------- between two steps


def test_the_same_policy_keeps_all_and_one_that_has_left_keeps_nothing() -> None:
    for shift, kept in ((0.0, LONGEST), (-60.0, 0)):
        run = Run(Policy(shift))
        assert run.step(1) == run.step(2) == [{}, {}, {}]
        prefixes = run.step(3, updates=False)
        assert [set(slots) for slots in prefixes] == [set(range(SAMPLES)) if kept else set()] * PER_STEP
        for row, slots in enumerate(prefixes):
            assert sorted(p.token_ids[0] for p in slots.values()) == (
                [100 + 10 * row + sample for sample in range(SAMPLES)] if kept else []
            )
            assert all(prefix.complete and prefix.versions == [2] * LONGEST for prefix in slots.values())
        told = run.source.metrics()
        assert told["soup/verified/responses"] == 12
        assert told["soup/verified/share"] == pytest.approx(1 / 3)  # of three steps, in which nobody asked
        assert told["soup/verified/accepted"] == 12 * kept
        assert told["soup/verified/whole"] == 12 * (kept > 0)


def test_what_is_kept_has_the_current_policys_version_and_log_probs() -> None:
    run = Run(Policy(-0.5), verification={"leniency": 1})
    for step in range(1, 9):
        prefixes = [prefix for slots in run.step(step) for prefix in slots.values()]
        assert bool(prefixes) == (step > 2)
        for prefix in prefixes:
            assert set(prefix.versions) == {step - 1}
            assert prefix.log_probs == pytest.approx([-1.5] * len(prefix))
            assert prefix.complete == (len(prefix) == LONGEST)
    assert {len(asked.prefix) for asked in run.scores.asked[-1]} == {LONGEST}


def test_each_sample_draws_anew_at_each_visit() -> None:
    run = Run(Policy(-0.5), verification={"leniency": 1})
    lengths = [
        tuple(len(slots.get(slot, ())) for slot in range(SAMPLES)) for s in range(1, 20) for slots in run.step(s)
    ]
    seen = Counter(length for visit in lengths[6:] for length in visit)
    assert set(seen) == set(range(LONGEST + 1))
    kept = seen[LONGEST] / sum(seen.values())
    assert abs(kept - np.exp(-0.5 * LONGEST)) < 0.08
    assert len(set(lengths[6:])) > 20


def test_only_the_share_that_is_asked_for_is_kept() -> None:
    run = Run(Policy(), mixed_share=0.5)
    run.step(1)
    run.step(2)
    assert [len(slots) for slots in run.step(3)] == [2, 2, 2]


def test_a_prompt_that_is_twice_in_a_step_has_its_last_visit_once() -> None:
    run = Run(Policy())
    run.fetch = lambda: (None, [[{"role": "user", "content": "same"}]] * PER_STEP, 0)
    run.source._fetch = run.fetch
    run.step(1)
    assert [len(slots) for slots in run.step(2)] == [SAMPLES, 0, 0]


def test_what_refills_a_step_is_not_verified() -> None:
    run = Run(Policy())
    for step in range(1, 3):
        run.step(step)
    assert all(run.source.take(3)[1])
    assert run.source.take(3)[1] == [{}, {}, {}]  # prompts that nobody knew of between the steps
    assert len(run.source.bank) == 0


# ---------------------------------------------------------------- exact replacement


def test_with_the_residual_what_comes_out_is_a_sample_of_the_current_policy() -> None:
    """20,000 responses of mu, verified, and continued by pi; each frequency within five standard deviations."""
    mu, pi, rng = np.array([0.3, 0.2, 0.5]), np.array([0.5, 0.3, 0.2]), np.random.default_rng(0)
    run = Run(Policy(distribution=pi.tolist()), longest=3, verification={"leniency": 1, "rejected": "residual"})
    source, found, tries, resampled = run.source, Counter[tuple[int, ...]](), 20_000, 0

    def ended(ids: list[int]) -> bool:
        return len(ids) == 3 or ids[-1:] == [END]

    for ordinal in range(tries):
        ids: list[int] = []
        while not ended(ids):
            ids.append(int(rng.choice(3, p=mu)))
        stored = FinishedSample(
            1, ordinal, np.array(ids), np.log(mu[ids]), np.zeros(len(ids), int), 0.0,
            prompt_ids=np.array([7]), distributions=np.tile(np.log(mu), (len(ids), 1)),
        )  # fmt: skip
        source._drop(1)
        source._store(1, 0, stored, 0)
        asked = SampledPrefix(ordinal, 0, source.bank.of(1)[0], 0, True, prompt_ids=[7])
        prefix = source._verified(1, asked, run.scores.distributions([asked])[0], 4)
        now = prefix.token_ids.tolist()
        assert prefix.complete == ended(now)
        assert prefix.log_probs == pytest.approx(np.log(pi[now]))
        assert prefix.version_spans == ((4, len(now)),)
        resampled += now != ids
        while not ended(now):
            now.append(int(rng.choice(3, p=pi)))
        found[tuple(now)] += 1
    assert resampled > tries / 10
    for response, count in found.items():
        chance = float(np.prod(pi[list(response)]))
        assert abs(count / tries - chance) < 5 * (chance * (1 - chance) / tries) ** 0.5


# ---------------------------------------------------------------- checkpoints


def tokens_of(prefixes: list[dict[int, Prefix]]) -> list[dict[int, list[int]]]:
    return [{slot: prefix.token_ids.tolist() for slot, prefix in slots.items()} for slots in prefixes]


@pytest.mark.parametrize("updated_before", [False, True])
def test_a_resumed_run_draws_the_same(tmp_path: Path, updated_before: bool) -> None:
    """The real path saves before it verifies, the lab after it."""
    whole, stopped, resumed = (Run(Policy(-0.5), verification={"leniency": 1}) for _ in range(3))
    expected = [tokens_of(whole.step(step)) for step in range(1, 8)]
    for step in range(1, 5):
        stopped.step(step, updates=step < 4 or updated_before)
    stopped.source.save(tmp_path)
    resumed.source.load(tmp_path)
    resumed.fetched = stopped.source.resume_state(lambda: stopped.fetched)
    resumed.source.updated(4)
    assert [tokens_of(resumed.step(step)) for step in range(5, 8)] == expected[4:]
    assert all(asked.prompt_ids == [7, 8, asked.ordinal % 3] for asked in resumed.scores.asked[0])


def test_distributions_are_in_the_checkpoint(tmp_path: Path) -> None:
    exact = {"leniency": 1, "rejected": "residual"}
    run = Run(Policy(), verification=exact)
    rng = np.random.default_rng(0)
    kept = {}
    for prompt, length in ((3, 2), (4, 5)):
        for slot in range(2):
            kept[prompt, slot] = rng.random((length, 3)).astype(np.float32)
            values = np.arange(length), np.zeros(length), np.zeros(length, int)
            run.source._store(
                prompt, slot, FinishedSample(prompt, 0, *values, 0.0, None, np.array([prompt]), kept[prompt, slot]), 0
            )
    run.source.save(tmp_path)
    again = Run(Policy(), verification=exact)
    again.source.load(tmp_path)
    for (prompt, slot), values in kept.items():
        assert np.array_equal(again.source._beside[prompt].distributions[slot], values)
        assert again.source._beside[prompt].prompt_ids.tolist() == [prompt]


@pytest.mark.parametrize(
    ("changed", "verification", "left", "told"),
    [
        ([LENGTH], {}, 0, {OTHER_LENGTH: 24}),
        (["algorithm.soup.verification.leniency"], {}, 24, {}),
        (["algorithm.soup.prefix_length.max"], {}, 24, {}),
        (
            ["algorithm.soup.verification.rejected"],
            {"leniency": 1, "rejected": "residual"},
            0,
            {NO_DISTRIBUTION: 24},
        ),
    ],
)
def test_what_fits_settings_that_have_changed(
    tmp_path: Path, changed: list[str], verification: dict[str, Any], left: int, told: dict[str, int]
) -> None:
    run = Run(Policy())
    run.step(1)
    run.step(2)
    run.source.save(tmp_path)
    again = Run(Policy(), verification=verification)
    again.source.load(tmp_path)
    assert dict(again.source.adapt(2, changed)) == told
    assert len(again.source.bank) == left


def test_fewer_samples_leave_fewer_responses(tmp_path: Path) -> None:
    run = Run(Policy())
    run.step(1)
    run.step(2)
    run.source.save(tmp_path)
    again = Run(Policy(), mixed_share=0.5)
    again.source.load(tmp_path)
    again.source.adapt(2, ["algorithm.soup.mixed_share"])
    assert len(again.source.bank) == 12
