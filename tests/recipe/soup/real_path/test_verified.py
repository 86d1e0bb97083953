"""Verified replay on the real path, and a run that goes on from a checkpoint."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from real_run import STARTED, RealRun, assert_engine_agrees, assert_exact

from recipe.soup.prefixes.verification import VERIFIED_FILE
from recipe.soup.tools.exactness import Bounds
from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_more

VERIFIED = (
    "algorithm=soup",
    "algorithm.soup.source=replay",
    "algorithm.soup.selection=verified",
    "algorithm.soup.mixed_share=1",
    "data.train_max_samples=16",
    "data.shuffle=false",
    "trainer.total_epochs=100",
)
COUNTED = ("responses", "tokens", "accepted", "whole")


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """16 prompts, eight a step: they come again every second step."""
    run = RealRun(tmp_path_factory.mktemp("verified"), clean_environ, *VERIFIED, "trainer.total_training_steps=6")
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def counted(metrics: dict[str, float]) -> list[float]:
    return [metrics[f"soup/verified/{name}"] for name in COUNTED]


def test_every_token_is_one_of_the_current_policy_and_has_its_log_prob(verified: RealRun, countdown_dir: Path) -> None:
    samples = read_samples(verified.samples)
    for step, rows in samples.items():
        assert {version for row in rows for version in row["policy_versions"]} == {step - 1}
        assert all(row["prefix_length"] == 0 for row in rows)
    found = verify(verified.samples, verified.checkpoints, str(countdown_dir / "base_model"))
    assert_exact(found, Bounds(expected=("continuation",)))
    # What was recorded with accepted tokens is the trainer's at the same weights.
    assert_engine_agrees(verified.metrics("soup").values(), "train/continuation")


def test_accepted_tokens_are_the_beginnings_of_the_last_visits_responses(verified: RealRun) -> None:
    metrics, last = verified.metrics("soup"), defaultdict(list)
    for step, rows in sorted(read_samples(verified.samples).items()):
        told = metrics[step]
        visited: dict[Any, list[list[int]]] = defaultdict(list)
        for row in rows:
            visited[tuple(row["prompt_ids"])].append(row["response_ids"])
        if step <= 2:
            assert counted(told) == [0, 0, 0, 0]
        else:
            before = [response for prompt in visited for response in last[prompt]]
            assert told["soup/verified/responses"] == len(rows) == len(before)
            assert told["soup/verified/tokens"] == sum(map(len, before))
            assert 0.2 < told["soup/verified/accepted_share"] < 1
            assert told["soup/verified/seconds"] > 0
            # As many responses came back whole as it tells, or more: what was rejected may be sampled again.
            same = sum(response in last[prompt] for prompt, responses in visited.items() for response in responses)
            assert same >= told["soup/verified/whole"] > 0
            shared = sum(
                max(common(response, earlier) for earlier in last[prompt])
                for prompt, responses in visited.items()
                for response in responses
            )
            assert shared >= told["soup/verified/accepted"]
        last.update(visited)


def common(one: list[int], other: list[int]) -> int:
    """Number of first tokens that both have."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def test_a_run_that_goes_on_accepts_the_same_tokens(
    verified: RealRun, tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    assert (verified.checkpoints / "global_step_3" / VERIFIED_FILE).exists()
    verified.copy_checkpoints(tmp_path, up_to=3)
    run = RealRun(tmp_path, clean_environ, *VERIFIED, "trainer.total_training_steps=5", "trainer.resume_mode=auto")
    assert run.finish(STARTED) == 0, run.log[-4000:]
    assert counted(run.metrics("soup")[4]) == counted(verified.metrics("soup")[4])
    assert run.metrics("soup")[5]["soup/verified/share"] == 1
