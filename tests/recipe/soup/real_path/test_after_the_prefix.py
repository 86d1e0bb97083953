"""What comes after a stale prefix, on the real path: its weight, negatives without a gradient, and too old prefixes."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from real_run import STARTED, RealRun, assert_exact

from recipe.soup.tools.verify import load, read_samples, response_log_probs, verify

pytestmark = pytest.mark.real_more

STEPS, PROMPTS, SAMPLES, MAX_AGE = 7, 8, 8, 3
LOW, HIGH = 0.95, 1.05
REPLAY = (  # 16 prompts, eight a step: they come again in every second step
    "algorithm=soup",
    "algorithm.soup.source=replay",
    "data.train_max_samples=16",
    "data.shuffle=false",
    "trainer.total_epochs=100",
    f"trainer.total_training_steps={STEPS}",
    "algorithm.soup.prefix_length.max=8",
)


class Row(NamedTuple):
    """A sample of a step, and log pi_old - log mu of its prefix's tokens, anew from the checkpoints."""

    step: int
    row: dict
    log_ratio: np.ndarray


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    run = RealRun(
        tmp_path_factory.mktemp("weighed"),
        clean_environ,
        *REPLAY,
        "algorithm.soup.continuation_weight=whole",
        f"algorithm.soup.stale_negatives.low={LOW}",
        f"algorithm.soup.stale_negatives.high={HIGH}",
        f"algorithm.soup.max_age={MAX_AGE}",
    )
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


@pytest.fixture(scope="module")
def mixed(weighed: RealRun, countdown_dir: Path) -> list[Row]:
    """Its samples with a prefix."""
    weighed_rows = []
    for step, rows in read_samples(weighed.samples).items():
        rows = [row for row in rows if row["prefix_length"]]
        if not rows:
            continue
        folder = weighed.checkpoints / f"global_step_{step - 1}" / "actor" / "huggingface"
        current = response_log_probs(load(folder, "cpu", str(countdown_dir / "base_model")), rows, 1.0)
        for row, log_probs in zip(rows, current, strict=True):
            n = row["prefix_length"]
            weighed_rows.append(Row(step, row, log_probs[:n].astype(float) - np.array(row["old_log_probs"][:n])))
    return weighed_rows


def by_step(rows: list[Row]) -> Iterator[tuple[int, list[Row]]]:
    steps = defaultdict(list)
    for row in rows:
        steps[row.step].append(row)
    yield from sorted(steps.items())


def test_verify_is_clean(weighed: RealRun, countdown_dir: Path) -> None:
    assert_exact(verify(weighed.samples, weighed.checkpoints, str(countdown_dir / "base_model")))


def test_a_prefix_that_is_too_old_is_dropped_and_counted(weighed: RealRun, mixed: list[Row]) -> None:
    metrics, dropped = weighed.metrics("soup"), 0.0
    counts = {step: len(rows) for step, rows in by_step(mixed)}
    for step in range(3, STEPS + 1):
        dropped += metrics[step]["soup/cost/too_old"]
        assert counts[step] + metrics[step]["soup/cost/too_old"] == PROMPTS * SAMPLES // 2
    # Those that began with tokens of the visit before the last one.
    assert dropped > 0
    ages = [s.step - 1 - version for s in mixed for version in s.row["policy_versions"][: s.row["prefix_length"]]]
    assert set(ages) == {2}


def test_the_continuation_weighs_the_product_of_the_prefixs_ratios(weighed: RealRun, mixed: list[Row]) -> None:
    metrics = weighed.metrics("soup")
    for step, rows in by_step(mixed):
        goes_on = [s for s in rows if len(s.row["response_ids"]) > s.row["prefix_length"]]
        weights = np.exp([s.log_ratio.sum() for s in goes_on])
        name = "soup/train/continuation/weight"
        assert metrics[step][f"{name}/mean"] == pytest.approx(weights.mean(), rel=1e-4)
        assert metrics[step][f"{name}/max"] == pytest.approx(weights.max(), rel=1e-4)
        assert metrics[step][f"{name}/clipped"] == 0
        assert weights.std() > 1e-3


def test_negatives_behind_an_outlier_are_counted(weighed: RealRun, mixed: list[Row]) -> None:
    metrics, found = weighed.metrics("soup"), 0
    for step, rows in by_step(mixed):
        samples = tokens = 0
        for s in rows:
            outside = np.flatnonzero((s.log_ratio < np.log(LOW)) | (s.log_ratio > np.log(HIGH)))
            behind = len(s.row["response_ids"]) - outside[0] - 1 if len(outside) else 0
            if s.row["advantage"] < 0 and behind:
                samples, tokens = samples + 1, tokens + behind
        name = "soup/train/stale_negatives"
        assert (metrics[step][f"{name}/samples"], metrics[step][f"{name}/tokens"]) == (samples, tokens)
        found += samples
        assert metrics[step]["actor/grad_norm"] > 0
    assert found > 0


@pytest.mark.parametrize("loss", ["ctpo", "m2po"])
def test_losses_for_stale_tokens_run_and_stay_exact(
    loss: str, tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path
) -> None:
    overrides = ("algorithm=soup", "algorithm.soup.lag=2", "trainer.total_training_steps=5")
    run = RealRun(tmp_path, clean_environ, *overrides, f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}")
    assert run.finish(STARTED) == 0, run.log[-4000:]
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))
    for step, metrics in run.metrics("soup").items():
        assert (metrics["soup/train/prefix/tokens"] > 0) == (step > 1)  # of the base model, until there are others
        assert metrics["actor/grad_norm"] > 0
        assert np.isfinite(metrics["actor/pg_loss"])
        assert 0 <= metrics["actor/pg_clipfrac"] < 1
