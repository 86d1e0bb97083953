"""Demonstrations of a data set on the real path: told apart from history, skipped by verify, shown, and gated."""

import random
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest
from real_run import STARTED, RealRun, assert_exact

from examples.countdown.build_data import to_row
from examples.countdown.task import random_problem, solutions
from recipe.soup.tools.exactness import Bounds
from recipe.soup.tools.show import coloured
from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_more

STEPS, PROMPTS, SAMPLES = 4, 8, 8


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """Half of each group starts from the one demonstration of its prompt; some prefixes are all of it."""
    folder = tmp_path_factory.mktemp("demonstrated")
    rng = random.Random(0)
    rows = []
    for index in range(STEPS * PROMPTS):
        problem = random_problem(rng)
        # The last prompts have none.
        rows.append(to_row(problem, index, solutions(problem)[: index < STEPS * PROMPTS - 3]))
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    run = RealRun(
        folder,
        clean_environ,
        "algorithm=soup",
        f"data.train_files={folder}/train.parquet",
        "data.shuffle=false",
        f"trainer.total_training_steps={STEPS}",
        "algorithm.soup.source=dataset",
        "algorithm.soup.ratio=luffy",
        "algorithm.soup.prefix_length.max=16",
        "algorithm.soup.demonstrations.gate=unsolved",
    )
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_verify_skips_demonstrations_and_is_exact_for_all_other_tokens(
    demonstrated: RealRun, countdown_dir: Path
) -> None:
    compared = verify(demonstrated.samples, demonstrated.checkpoints, str(countdown_dir / "base_model"))
    assert_exact(compared, Bounds(expected=("continuation",)))
    rows = [row for step in read_samples(demonstrated.samples).values() for row in step]
    known = sum(version != -2 for row in rows for version in row["policy_versions"])
    assert compared["prefix"].claimed == []
    assert len(compared["continuation"].claimed) == known > 0


def test_the_beginning_of_a_sample_is_that_of_its_prompts_demonstration(demonstrated: RealRun) -> None:
    texts = {
        row["prompt"][0]["content"]: None if row["target"] is None else row["target"][0]["content"]
        for row in pd.read_parquet(demonstrated.folder / "train.parquet").to_dict("records")
    }
    lengths, complete = set(), 0
    for step, rows in read_samples(demonstrated.samples).items():
        for row in rows:
            length = row["demonstration_length"]
            assert row["prefix_length"] == 0
            assert row["policy_versions"] == [-2] * length + [step - 1] * (len(row["policy_versions"]) - length)
            if length:
                lengths.add(length)
                shown = row["marked"][1 : row["marked"].index("⦆")]
                [text] = [text for prompt, text in texts.items() if text is not None and prompt in row["input"]]
                assert text.startswith(shown)
                if length == len(row["policy_versions"]):
                    complete += 1
                    assert (shown, row["score"]) == (text, 1)
        assert sum(row["demonstration_length"] > 0 for row in rows) == SAMPLES // 2 * (PROMPTS - 3 * (step == STEPS))
    assert len(lengths) > 8
    assert complete > 0


def test_a_demonstration_counts_where_nothing_else_succeeded(demonstrated: RealRun) -> None:
    metrics = demonstrated.metrics("soup")
    opened = closed = 0
    for step, rows in read_samples(demonstrated.samples).items():
        groups = defaultdict(list)
        for row in rows:
            groups[row["uid"].rsplit("_", 2)[0]].append(row)
        left_out = 0
        for group in groups.values():
            own = [row for row in group if not row["demonstration_length"]]
            solved = any(row["score"] > 0 for row in own)
            counted = own if solved else group
            mean = sum(row["score"] for row in counted) / len(counted)
            for row in group:
                if row in counted:
                    assert (row["advantage"] > 0) == (row["score"] > mean)
                else:
                    left_out += 1
                    assert row["advantage"] == row["prefix_advantage"] == 0
            has_any = len(own) < SAMPLES
            opened, closed = opened + (has_any and not solved), closed + (has_any and solved)
        name = "soup/train/demonstration"
        assert metrics[step][f"{name}/left_out"] == left_out
        assert metrics[step][f"{name}/tokens"] == sum(row["demonstration_length"] for row in rows)
        assert metrics[step]["soup/demonstrations/prompts_without"] == 3 * (step == STEPS)
        assert metrics[step]["soup/train/prefix/tokens"] == 0
        assert metrics[step]["soup/train/continuation/engine_mismatch/max"] < 1e-4
        assert metrics[step]["actor/grad_norm"] > 0
    assert opened > 0
    assert closed > 0


def test_show_gives_demonstrations_a_colour_of_their_own(demonstrated: RealRun) -> None:
    [row] = [row for row in read_samples(demonstrated.samples)[1] if row["demonstration_length"] > 3][:1]
    text = coloured(row, brackets=False)
    shown = row["marked"][1 : row["marked"].index("⦆")]
    styled = {str(span.style): text.plain[span.start : span.end] for span in text.spans}
    assert styled["black on green"] == shown
