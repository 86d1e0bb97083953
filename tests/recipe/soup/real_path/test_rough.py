"""Everything at once: ramp, cut, refills, failures; and the resume of such a run."""

from pathlib import Path

import pandas as pd
import pytest
from real_run import STARTED, RealRun, assert_engine_agrees, assert_exact, versions_of_prefixes

from recipe.soup.prefixes.bank import PrefixBank
from recipe.soup.tools.verify import read_samples, verify
from verl_ext.health import NOTICE

pytestmark = pytest.mark.real_run

FLAKY = Path(__file__).parents[3] / "support" / "flaky_reward.py"


ROUGH = (
    "algorithm=soup",
    "algorithm.soup.lag=3",
    "algorithm.soup.warm_start=ramp",
    "algorithm.soup.on_eos=cut",
    "algorithm.soup.prefix_length.max=23",
    "algorithm.soup.lag_distribution=uniform",
    "algorithm.soup.selection=entropic",
    "algorithm.soup.candidates=2",
    "algorithm.soup.samples_per_prefix=2",
    "algorithm.soup.baseline=two_level",
    "algorithm.soup.behavior_log_probs=trainer",
    "actor_rollout_ref.rollout.temperature=0.7",
    "algorithm.filter_groups.enable=true",
    f"reward.custom_reward_function.path={FLAKY}",
    "algorithm.soup.max_lost_share=0.5",
    "data.train_max_samples=24",
    "data.shuffle=false",
    "trainer.total_epochs=100",
    "trainer.total_training_steps=7",
    "trainer.test_freq=7",
)


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """Ramp, cut ends, temperature 0.7, filtered groups with refills, a failing grader, epochs of three steps; drawn
    lags, chosen and shared prefixes, log-probs by the trainer."""
    run = RealRun(tmp_path_factory.mktemp("rough"), clean_environ, *ROUGH)
    assert run.finish(STARTED + 200) == 0, run.log[-4000:]
    return run


def test_ratios_stay_exact_at_another_temperature_with_refills_and_failures(
    rough: RealRun, countdown_dir: Path
) -> None:
    assert_exact(verify(rough.samples, rough.checkpoints, str(countdown_dir / "base_model"), temperature=0.7))


def test_ramp_begins_after_step_1_and_never_exceeds_the_lag(rough: RealRun) -> None:
    samples = read_samples(rough.samples)
    assert sorted(samples) == list(range(1, 8))
    assert versions_of_prefixes(samples[1]) == set()
    for step, rows in samples.items():
        assert all(max(step - 4, 0) <= version < step - 1 for version in versions_of_prefixes(rows))


def test_filtered_groups_do_not_take_the_seeds_that_they_hosted_with_them(rough: RealRun) -> None:
    """About half of the groups are filtered out. What is lost are the seeds of samples whose grading failed."""
    metrics = [values for step, values in rough.metrics("soup").items() if step > 0]
    assert sum(values.get("training/filter_groups/evicted_samples", 0) for values in metrics) > 7
    requests = sum(values["soup/cost/seed_requests"] for values in metrics)
    assert sum(values["soup/cost/seeds_lost"] for values in metrics) < 0.2 * requests


def test_nothing_is_left_for_steps_that_never_come(rough: RealRun) -> None:
    last = rough.metrics("soup")[7]
    assert last["soup/cost/seed_requests"] == 0
    assert last["soup/bank/prefixes"] == 0


def test_failed_prompts_leave_incomplete_groups_and_no_padding_in_the_dump(rough: RealRun) -> None:
    rows = [row for rows in read_samples(rough.samples).values() for row in rows]
    assert len(rows) < 7 * 64
    assert not any(row["uid"].startswith("pad") for row in rows)


def test_lost_samples_are_counted_and_the_first_error_is_told_in_the_terminal(rough: RealRun) -> None:
    rows = read_samples(rough.samples)
    lost = 0.0
    for step, metrics in rough.metrics("soup").items():
        asked, arrived, trained, share = (
            metrics[f"soup/train/samples/{name}"] for name in ("asked", "arrived", "trained", "lost_share")
        )
        assert asked >= 64
        assert asked >= arrived >= trained == len(rows[step])
        assert share == pytest.approx((asked - arrived) / asked)
        lost += asked - arrived
    assert 0 < lost < 100
    assert rough.terminal.count(NOTICE) == 1
    assert "the first error was ValueError: a grader that fails now and then." in rough.terminal


def test_cut_prefixes_have_no_end_token_and_are_counted(rough: RealRun) -> None:
    rows = [row for rows in read_samples(rough.samples).values() for row in rows]
    mixed = [row for row in rows if row["prefix_length"]]
    assert mixed
    assert all(1 not in row["response_ids"][: row["prefix_length"]] for row in mixed)
    assert sum(metrics["soup/cost/seeds_ended"] for metrics in rough.metrics("soup").values()) > 0


def test_two_samples_share_each_prefix_and_differ_behind_it(rough: RealRun) -> None:
    sharing: dict[tuple, list[dict]] = {}
    for step, rows in read_samples(rough.samples).items():
        for row in (row for row in rows if row["prefix_length"]):
            prompt, sample, _ = row["uid"].rsplit("_", 2)
            sharing.setdefault((step, prompt, int(sample) // 2), []).append(row)
    pairs = [pair for pair in sharing.values() if len(pair) == 2]
    assert len(pairs) > 10
    for one, other in pairs:
        length = one["prefix_length"]
        assert length == other["prefix_length"]
        assert one["response_ids"][:length] == other["response_ids"][:length]
        assert one["old_log_probs"][:length] == other["old_log_probs"][:length]
        assert one["prefix_advantage"] == pytest.approx(other["prefix_advantage"], abs=1e-5)
    assert any(one["response_ids"] != other["response_ids"] for one, other in pairs)
    assert any(one["advantage"] != one["prefix_advantage"] for one, _ in pairs)


def test_the_trainer_computes_the_prefixes_log_probs_and_says_how_far_the_engine_was_off(rough: RealRun) -> None:
    metrics = [m for m in rough.metrics("soup").values() if m["soup/cost/seed_tokens"] > 0]
    assert metrics
    assert_engine_agrees(metrics, "prefix")


def test_a_resumed_run_goes_on_with_its_prefixes_and_its_place_in_the_data(
    rough: RealRun, tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path
) -> None:
    rough.copy_checkpoints(tmp_path, up_to=4)
    bank, next_ordinal, _ = PrefixBank.load(tmp_path / "checkpoints" / "global_step_4" / "soup_bank.npz")
    assert len(bank) > 0
    # data.shuffle=false: prompt i of the run is problem i % 24.
    kept = {
        (ordinal % 24, tuple(prefix.token_ids.tolist()))
        for ordinal in range(next_ordinal, next_ordinal + 24)
        for prefix in bank.take(ordinal).values()
    }

    run = RealRun(tmp_path, clean_environ, *ROUGH, "trainer.resume_mode=auto")
    assert run.finish(STARTED) == 0, run.log[-4000:]
    samples = read_samples(run.samples)
    assert sorted(samples) == [5, 6, 7]
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model"), temperature=0.7))
    problems = [(problem["numbers"], problem["target"]) for problem in _problems(countdown_dir)[:24]]
    from_before = 0
    for row in samples[5]:
        if row["prefix_length"] and row["policy_versions"][0] < 4:
            problem = problems.index((row["gts"]["numbers"], row["gts"]["target"]))
            assert (problem, tuple(row["response_ids"][: row["prefix_length"]])) in kept
            from_before += 1
    assert from_before > 0


def _problems(countdown_dir: Path) -> list[dict]:
    rows = pd.read_parquet(countdown_dir / "data" / "train.parquet")["reward_model"]
    return [{"numbers": list(row["ground_truth"]["numbers"]), "target": row["ground_truth"]["target"]} for row in rows]
