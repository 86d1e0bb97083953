"""Several turns with a calculator between them, at lag 1."""

import re
from collections import Counter
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from real_run import COMMON, STARTED, RealRun, assert_engine_agrees, assert_exact, versions_of_prefixes

from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_more

CALCULATOR = Path(__file__).parents[3] / "support" / "counted_calculator.py"
STEPS = 4
STEP = re.compile(r"(\d+)([-+*])(\d+)=$")


def calculating(folder: Path, environ: dict[str, str], *overrides: str) -> RealRun:
    """A run to its end, which notes each call of the calculator."""
    common = [override.replace("example=countdown", "example=countdown_tool") for override in COMMON]
    counted = f"actor_rollout_ref.rollout.multi_turn.function_tool_path={CALCULATOR}"
    environ = {**environ, "CALCULATED": str(folder / "calculated.txt")}
    run = RealRun(folder, environ, "algorithm=soup", counted, *overrides, common=common)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    overrides = ["algorithm.soup.lag=1", f"trainer.total_training_steps={STEPS}"]
    return calculating(tmp_path_factory.mktemp("tools"), clean_environ, *overrides)


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """16 prompts, eight a step: they come again in every second step, as a rule."""
    overrides = ["algorithm.soup.source=replay", "data.train_max_samples=16", "algorithm.soup.prefix_length.max=6"]
    overrides += ["trainer.total_epochs=100", "trainer.total_training_steps=6", "algorithm.soup.mixed_share=0.75"]
    overrides += ["algorithm.soup.behavior_log_probs=trainer"]
    return calculating(tmp_path_factory.mktemp("replay"), clean_environ, *overrides)


@pytest.fixture(scope="module")
def rows(tools: RealRun) -> dict[int, list[dict]]:
    return read_samples(tools.samples)


def stretches(row: dict) -> list[tuple[bool, list[int], list[int]]]:
    """Of each turn, and of each answer between two: whether it was sampled, its tokens, their versions."""
    tokens = zip(row["response_mask"], row["response_ids"], row["policy_versions"], strict=True)
    parts = [(bool(mine), list(part)) for mine, part in groupby(tokens, key=lambda token: token[0])]
    return [(mine, [token[1] for token in part], [token[2] for token in part]) for mine, part in parts]


def test_every_sampled_token_has_the_log_prob_of_its_version(
    tools: RealRun, rows: dict[int, list[dict]], countdown_dir: Path
) -> None:
    compared = verify(tools.samples, tools.checkpoints, str(countdown_dir / "base_model"))
    assert_exact(compared)
    sampled = sum(sum(row["response_mask"]) for step in rows.values() for row in step)
    assert sum(len(comparison.claimed) for comparison in compared.values()) == sampled
    assert_engine_agrees(tools.metrics_of("countdown_tool", "soup").values(), "train/continuation")


def test_versions_are_those_of_lag_1_and_nobodys_between_turns(rows: dict[int, list[dict]]) -> None:
    assert versions_of_prefixes(rows[1]) == set()
    for step in range(2, STEPS + 1):
        assert versions_of_prefixes(rows[step]) == {max(step - 2, 0)}
        for row in rows[step]:
            for i, (mine, _, versions) in enumerate(stretches(row)):
                of_first_turn = {step - 1, step - 2} if row["prefix_length"] else {step - 1}
                assert set(versions) <= ((of_first_turn if i == 0 else {step - 1}) if mine else {-2})


def test_prefixes_lie_within_the_first_turn_and_some_end_it(rows: dict[int, list[dict]]) -> None:
    ends = Counter[str]()
    for step in range(2, STEPS + 1):
        assert sum(row["prefix_length"] > 0 for row in rows[step]) == 32
        for row in (row for row in rows[step] if row["prefix_length"]):
            first, *others = stretches(row)
            assert row["prefix_length"] <= min(len(first[1]), 4)
            within = row["prefix_length"] < len(first[1])
            ends["within" if within else "calls a tool" if others else "ends the response"] += 1
    assert ends["within"] > 20
    assert ends["calls a tool"] > 5


def test_tools_run_as_often_as_samples_have_answers_and_answer_what_stands_there(
    tools: RealRun, rows: dict[int, list[dict]], countdown_dir: Path
) -> None:
    """Also behind a prefix that ended its turn; and never for a prefix that is only sampled for later."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(countdown_dir / "base_model")
    answered = Counter[str]()
    for row in (row for step in rows.values() for row in step):
        parts = stretches(row)
        for before, (mine, answer, _) in pairwise(parts):
            if not mine:
                found = STEP.search(tokenizer.decode(before[1]))
                assert found is not None
                answered[f"{found[0]}{tokenizer.decode(answer)}"] += 1
    calculated = Counter((tools.folder / "calculated.txt").read_text().split())
    full = calculated - answered
    assert answered - calculated == Counter()
    # An answer that had no room is not in its sample.
    assert sum(full.values()) < 0.02 * sum(answered.values())
    assert sum(answered.values()) > 400


def test_masks_take_what_tools_wrote_out_of_all_counts(tools: RealRun, rows: dict[int, list[dict]]) -> None:
    for step, metrics in tools.metrics_of("countdown_tool", "soup").items():
        written = sum(row["response_mask"].count(0) for row in rows[step])
        assert metrics["soup/train/tool_tokens"] == written > 0
        sampled = sum(sum(row["response_mask"]) for row in rows[step])
        assert metrics["soup/train/prefix/tokens"] + metrics["soup/train/continuation/tokens"] == sampled
        # Two mini-batches.
        trained = metrics["soup/loss/prefix/tokens"] + metrics["soup/loss/continuation/tokens"]
        assert trained == pytest.approx(sampled / 2)
        assert metrics["actor/grad_norm"] > 0


def test_a_replayed_prefix_is_cut_at_the_end_of_the_first_turn(replay: RealRun, countdown_dir: Path) -> None:
    """Also a longer one would be: it calls its tool anew, and nothing that a tool answered is replayed."""
    assert_exact(verify(replay.samples, replay.checkpoints, str(countdown_dir / "base_model")))
    rows = read_samples(replay.samples)
    ends = 0
    for step in range(3, 7):
        assert sum(row["prefix_length"] > 0 for row in rows[step]) == 48
        for row in (row for row in rows[step] if row["prefix_length"]):
            first, *others = stretches(row)
            assert row["prefix_length"] <= len(first[1])
            ends += row["prefix_length"] == len(first[1]) and len(others) > 1
            prefix = row["response_ids"][: row["prefix_length"]]
            # Each epoch has an order of its own.
            earlier = [
                r for e in range(max(step - 3, 1), step) for r in rows[e] if r["prompt_ids"] == row["prompt_ids"]
            ]
            assert any(r["response_ids"][: len(prefix)] == prefix for r in earlier)
    assert ends > 20
    answers = sum(not mine for step in rows.values() for row in step for mine, _, _ in stretches(row))
    called = len((replay.folder / "calculated.txt").read_text().split())
    assert 0 <= called - answers < 0.02 * answers  # an answer that had no room is not in its sample
