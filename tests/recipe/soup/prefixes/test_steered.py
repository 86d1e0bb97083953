"""Steered prefixes: a controller for each prompt, and prefixes of the outcome that it asks for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.soup.prefixes.finished import FinishedSample, fingerprint
from recipe.soup.prefixes.make_source import make_source
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.steered import SteeredSource, least_certain
from recipe.soup.prefixes.steering import Steering, Stored, withdrawn
from recipe.soup.settings import parse_settings
from recipe.soup.settings.steering import SteeringSettings

PROMPTS, SAMPLES, LENGTH = 2, 4, 10
MESSAGES = [[{"role": "user", "content": str(i)}] for i in range(PROMPTS)]


def settings_of(**keys: Any) -> Any:
    from omegaconf import OmegaConf

    return parse_settings(OmegaConf.create({"source": "replay", "selection": "steered", **keys}), 16)


class Run:
    """Two prompts, both in each step; each response has ten tokens.

    Args:
        solves: whether a sample is solved, given the prompt, the sample and its prefix.
    """

    def __init__(self, solves: Callable[[int, int, Prefix | None], bool], **keys: Any) -> None:
        facts = RunFacts(SAMPLES, 16, 0, PROMPTS, 20)
        self.solves = solves
        source = make_source(settings_of(**keys), facts, lambda: (None, MESSAGES, None), None, "", None)
        assert isinstance(source, SteeredSource)
        self.source = source
        self.metrics: dict[str, float] = {}

    def step(self, step: int, entropy: np.ndarray | None = None) -> list[dict[int, Prefix]]:
        chunk, prefixes = self.source.take(step)
        samples = []
        for row, slots in enumerate(prefixes):
            for sample in range(SAMPLES):
                prefix = slots.get(sample)
                begun = len(prefix) if prefix is not None else 0
                versions = np.array((prefix.versions if prefix is not None else []) + [step - 1] * (LENGTH - begun))
                ids = 1000 * step + 100 * row + 10 * sample + np.arange(LENGTH)
                if prefix is not None:
                    ids[:begun] = prefix.token_ids
                reward = float(self.solves(row, sample, prefix))
                ordinal = chunk.first_ordinal + row
                samples.append(
                    FinishedSample(
                        fingerprint(MESSAGES[row]), ordinal, ids, np.full(LENGTH, -1.0), versions, reward, entropy
                    )
                )
        self.source.keep(samples)
        self.metrics = self.source.metrics()
        return prefixes


def state(run: Run, row: int) -> Any:
    return run.source.steering.prompts[fingerprint(MESSAGES[row])]


def test_a_prompt_that_fails_starts_from_what_once_succeeded() -> None:
    """The first prompt is solved once, by one sample of the third step, and then where it is helped."""
    run = Run(lambda row, sample, prefix: row == 1 or prefix is not None or solved_now(sample))
    step = 0

    def solved_now(sample: int) -> bool:
        return step == 3 and sample == 2

    for step in (1, 2, 3):
        assert run.step(step)[0] == {}  # help is asked for, but nothing has succeeded
        assert run.metrics["soup/steering/without_prefix"] >= 1
    # p: 1/2, 1/4, 1/8, 3/16 after a quarter was solved; each visit adds 0.4 (1/2 - p).
    assert state(run, 0).solved == pytest.approx(3 / 16)
    assert state(run, 0).help == pytest.approx(0.4 * (1 / 4 + 3 / 8 + 5 / 16))
    slots = run.step(4)[0]
    assert sorted(slots) == [0, 1]  # half of the group
    for prefix in slots.values():  # the one success that there is
        assert prefix.token_ids.tolist() == (3020 + np.arange(4)).tolist()  # .375 of ten tokens
        assert prefix.versions == [2] * 4
        assert not prefix.complete
    assert state(run, 0).solved == pytest.approx((3 / 16 + 1) / 2)  # both mixed samples; the others do not count


def test_a_prompt_that_is_always_solved_starts_from_what_once_failed() -> None:
    run = Run(lambda row, sample, prefix: prefix is None and (row == 0 or sample < 2))
    run.step(1)
    assert state(run, 0).help == pytest.approx(0.4 * (0.5 - 0.75))
    first, second = run.step(2)
    assert first == {}  # it never failed
    assert second == {}  # half was solved: just right
    run.solves = lambda row, sample, prefix: prefix is None and sample != 3
    run.step(3)
    slots = run.step(4)[0]
    assert {prefix.token_ids[0] for prefix in slots.values()} == {3030}
    assert state(run, 0).help < 0


def test_each_mixed_sample_has_a_response_of_its_own_if_there_are_several() -> None:
    run = Run(lambda row, sample, prefix: False, mixed_share=1.0)
    run.step(1)
    run.solves = lambda row, sample, prefix: sample in (1, 3)
    run.step(2)
    firsts = [prefix.token_ids[0] % 100 // 10 for prefix in run.step(3)[0].values()]
    assert firsts == [1, 3, 1, 3]


@pytest.mark.parametrize("tokens", [1, 2, 3, 10])
@pytest.mark.parametrize("help_given", [0.01, 0.5, 0.8, 1.0])
def test_a_prefix_is_never_empty_or_complete(tokens: int, help_given: float) -> None:
    steering = Steering(SteeringSettings(limit=1.0))
    response = Prefix(np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.float32), ((0, tokens),), True)
    steering.store(0, True, Stored(response, 0, -1))
    steering.prompts[0].help = help_given
    for prefix in steering.prefixes(0, 3, 1.0):
        assert 1 <= len(prefix) <= tokens - 1
        assert len(prefix) == min(round(help_given * tokens), tokens - 1)


def test_the_last_ones_are_stored_at_eight_bytes_a_token() -> None:
    run = Run(lambda row, sample, prefix: sample == 0, steering={"kept": 2}, mixed_share=0.25)
    for step in range(1, 6):
        run.step(step)
    for row in range(PROMPTS):
        assert [len(of_outcome) for of_outcome in state(run, row).stored.values()] == [2, 2]
        assert [stored.visit for stored in state(run, row).stored[1]] == [6 + row, 8 + row]
    assert run.metrics["soup/steering/bytes"] == PROMPTS * 4 * LENGTH * 8


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=8), max_size=30), st.floats(0.1, 3), st.floats(0.1, 1))
def test_share_and_help_stay_within_their_bounds(visits: list[list[bool]], gain: float, limit: float) -> None:
    steering = Steering(SteeringSettings(gain=gain, limit=limit))
    p, h = 0.5, 0.0
    for solved in visits:
        steering.visited(7, solved)
        p = 0.5 * p + 0.5 * sum(solved) / len(solved)
        h = float(np.clip(h + gain * (0.5 - p), -limit, limit))
    assert (steering.prompts[7].solved, steering.prompts[7].help) == pytest.approx((p, h))
    assert 0 <= p <= 1
    assert abs(h) <= limit


def test_it_holds_the_solved_share_near_one_half() -> None:
    """A prompt that is solved with a probability of .1 alone, and more the more of a success it is given."""
    rng = np.random.default_rng(0)
    steering = Steering(SteeringSettings())
    solved = []
    for _ in range(400):
        chance = float(np.clip(0.1 + 0.9 * steering.prompts[0].help, 0, 1))
        samples = [bool(rng.random() < chance) for _ in range(4)]
        steering.visited(0, samples)
        solved += samples
    assert np.mean(solved[400:]) == pytest.approx(0.5, abs=0.05)


def test_help_is_withdrawn_by_cosine() -> None:
    settings = SteeringSettings(withdraw=10)
    shares = [withdrawn(settings, step, 100) for step in (1, 90, 95, 100)]
    assert shares == pytest.approx([1, 1, 0.5, 0])
    assert withdrawn(SteeringSettings(), 100, 100) == 1
    run = Run(lambda row, sample, prefix: sample == 0, steering={"withdraw": 2})
    for step in range(1, 20):
        run.step(step)
    assert run.step(20) == [{}, {}]  # step 20 is the last


def test_it_cuts_before_the_least_certain_token_of_the_middle_half() -> None:
    entropy = np.array([9.0, 0, 1, 2, 5, 0, 1, 0, 0, 9])
    assert least_certain(entropy) == 4
    assert least_certain(None) == least_certain(np.array([1.0])) == -1
    run = Run(lambda row, sample, prefix: sample == 0, steering={"cut": "entropy"})
    for step in range(1, 5):
        prefixes = run.step(step, entropy)
    assert {len(prefix) for slots in prefixes for prefix in slots.values()} == {4}
    run = Run(lambda row, sample, prefix: sample == 0, steering={"cut": "entropy"})
    for step in range(1, 5):
        prefixes = run.step(step)  # of groups that were evicted nothing is known: by share
    assert 4 not in {len(prefix) for slots in prefixes for prefix in slots.values()}


def test_a_resumed_run_goes_on_the_same(tmp_path: Path) -> None:
    def solves(row: int, sample: int, prefix: Prefix | None) -> bool:
        return (row + sample) % 3 == 0 or (prefix is not None and len(prefix) > 3)

    whole, first, second = (Run(solves) for _ in range(3))
    for step in range(1, 9):
        expected = whole.step(step)
        if step <= 5:
            first.step(step)
            if step == 5:
                first.source.save(tmp_path)
                second.source.load(tmp_path)
        else:
            for mine, theirs in zip(second.step(step), expected, strict=True):
                assert sorted(mine) == sorted(theirs)
                for slot in mine:
                    assert mine[slot].token_ids.tolist() == theirs[slot].token_ids.tolist()
                    assert mine[slot].versions == theirs[slot].versions
    assert any(expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "lookahead"}, "selection=steered: it needs responses whose reward is known; use source=replay"),
        ({"source": "snapshot"}, "selection=steered: it needs responses"),
        ({"prefix_length": {"unit": "fraction"}}, "prefix_length.unit=fraction: selection=steered decides each length"),
        ({"prefix_length": {"distribution": "whole"}}, "prefix_length.distribution=whole: selection=steered decides"),
        ({"samples_per_prefix": 2}, "samples_per_prefix=2: selection=steered shares no prefixes"),
        ({"baseline": "separate"}, "baseline=separate: mixed samples that share the one stored response"),
        ({"on_eos": "cut"}, "on_eos=cut: a steered prefix never ends its response"),
        ({"schedules": {"prefix_length": {"warmup": 3}}}, "schedules.prefix_length.shape=constant: use steering.with"),
        ({"steering": {"gain": 0}}, "steering.gain=0: a controller needs a gain above 0"),
        ({"steering": {"limit": 1.5}}, "steering.limit=1.5: a share lies above 0, up to 1"),
    ],
)
def test_what_does_not_go_with_it_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        settings_of(**keys)
    assert settings_of(baseline="separate", prefix_gradient=0).selection == "steered"
