"""Replay: what a prompt's visit leaves for its next one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipe.soup.settings import PrefixLengthSettings, SoupSettings
from recipe.soup.sources.base import FinishedSample, RunFacts, read_source
from recipe.soup.sources.replay import ReplaySource

PROMPTS, SAMPLES, RESPONSE_LENGTH = 6, 4, 8


class Run:
    """Epochs over six prompts, three a step; every response has five tokens of the step's version."""

    def __init__(self, length: PrefixLengthSettings, on_eos: str = "keep", share: float = 0.5) -> None:
        self.fetched = 0
        settings = SoupSettings(source="replay", mixed_share=share, prefix_length=length, on_eos=on_eos)
        self.source = ReplaySource(settings, RunFacts(SAMPLES, RESPONSE_LENGTH, 0, 3, 100), self.fetch)

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
                samples.append(FinishedSample(chunk.messages[row], ordinal, ids, -ids / 10, versions))
        self.source.keep(samples)
        return prefixes


def test_the_first_visit_mixes_nothing_and_the_next_one_what_it_left() -> None:
    run = Run(PrefixLengthSettings("fixed", 1, 3))
    assert run.step(1) == run.step(2) == [{}, {}, {}]
    for row, slots in enumerate(run.step(3)):
        assert set(slots) == {0, 1}  # half of four samples
        for prefix in slots.values():
            assert prefix.versions == [0, 0, 0]
            assert prefix.token_ids[0] // 10 == 10 + row  # of the same prompt, at step 1
            assert not prefix.complete


def test_a_mixed_response_that_is_replayed_again_keeps_every_tokens_version() -> None:
    run = Run(PrefixLengthSettings("fixed", 1, 4), share=1.0)
    for step in range(1, 5):
        run.step(step)
    versions = {tuple(prefix.versions) for slots in run.step(5) for prefix in slots.values()}
    assert versions == {(0, 0, 0, 0)}
    run = Run(PrefixLengthSettings("uniform", 1, 4), share=1.0)
    seen = {tuple(p.versions) for step in range(1, 30) for slots in run.step(step) for p in slots.values()}
    assert any(len(set(versions)) >= 3 for versions in seen)


def test_which_responses_are_kept_is_drawn_anew_at_each_visit() -> None:
    run = Run(PrefixLengthSettings("fixed", 1, 2))
    kept = {p.token_ids[0] % 10 for step in range(1, 20) for slots in run.step(step) for p in slots.values()}
    assert kept == set(range(SAMPLES))


def test_whole_is_trajectory_level_mixing() -> None:
    run = Run(PrefixLengthSettings("whole", 1, RESPONSE_LENGTH))
    run.step(1)
    run.step(2)
    prefixes = [prefix for slots in run.step(3) for prefix in slots.values()]
    assert len(prefixes) == 6
    assert all(prefix.complete and len(prefix) == 5 for prefix in prefixes)


@pytest.mark.parametrize("on_eos", ["keep", "cut"])
def test_a_response_shorter_than_the_prefix(on_eos: str) -> None:
    run = Run(PrefixLengthSettings("fixed", 1, 7), on_eos)
    run.step(1)
    run.step(2)
    prefixes = [prefix for slots in run.step(3) for prefix in slots.values()]
    assert all(prefix.complete == (on_eos == "keep") for prefix in prefixes)
    assert all(len(prefix) == (5 if on_eos == "keep" else 4) for prefix in prefixes)


def test_nothing_is_fetched_ahead_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    whole, stopped = (Run(PrefixLengthSettings("uniform", 1, 4)) for _ in range(2))
    expected = [whole.step(step) for step in range(1, 7)]
    for step in range(1, 4):
        stopped.step(step)
        assert stopped.fetched == 3 * step
    stopped.source.save(tmp_path)
    assert read_source(tmp_path) == "replay"
    resumed = Run(PrefixLengthSettings("uniform", 1, 4))
    resumed.source.load(tmp_path)
    resumed.fetched = stopped.source.resume_state(lambda: stopped.fetched)
    for step in range(4, 7):
        for slots, wanted in zip(resumed.step(step), expected[step - 1], strict=True):
            assert {s: (p.token_ids.tolist(), p.runs) for s, p in slots.items()} == {
                s: (p.token_ids.tolist(), p.runs) for s, p in wanted.items()
            }
