"""The real path: main_ppo, Ray, FSDP2 and vLLM on the CPU. Eight runs, shared by the tests below."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from real_run import RealRun
from transformers import AutoModelForCausalLM

from recipe.soup.prefixes import PrefixBank
from recipe.soup.verify import Comparison, read_samples, verify

pytestmark = pytest.mark.real_run

TOLERANCE = 1e-5  # nats
FAR = 1e-2  # what another version's log-probs must be away at least, at its most different token
STARTED = 300.0  # seconds until the first steps are through, on a busy machine
UNLIKELY = 2.2  # Kolmogorov's statistic of a uniform sample is larger in one of ten thousand cases
FLAKY = Path(__file__).parents[2] / "flaky_reward.py"
PARITY = Path(__file__).parents[2] / "parity_reward.py"


def assert_exact(comparisons: dict[str, Comparison]) -> None:
    for segment, comparison in comparisons.items():
        assert comparison.claimed, f"no tokens in the {segment}"
        assert max(comparison.claimed) < TOLERANCE, segment
        for distance, differences in comparison.others.items():
            assert max(differences) > FAR, f"{segment}: version {distance:+d} would have passed as well"


def versions_of_prefixes(rows: list[dict]) -> set[int]:
    return {version for row in rows for version in row["policy_versions"][: row["prefix_length"]]}


# ---------------------------------------------------------------- lag 2, pure, temperature 1; then a death


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> Iterator[RealRun]:
    """Six steps, after which the run's vLLM worker is killed."""
    overrides = ["algorithm.soup.lag=2", "algorithm.soup.warm_start=pure", "algorithm.soup.prefix_length.max=16"]
    folder = tmp_path_factory.mktemp("exact")
    run = RealRun(folder, clean_environ, "algorithm=soup", *overrides, "trainer.total_training_steps=500")
    try:
        run.wait_for(run.samples / "6.jsonl", STARTED)
        run.wait_for(run.checkpoints / "global_step_6" / "data.pt", 60)
        worker = next(process for process in run.descendants() if "VLLM::" in " ".join(process.cmdline()))
        killed = time.monotonic()
        os.kill(worker.pid, signal.SIGKILL)
        run.finish(120)
        run.seconds_to_end = time.monotonic() - killed  # pyright: ignore[reportAttributeAccessIssue]
        for path in run.samples.glob("*.jsonl"):
            if int(path.stem) > 6:
                path.unlink()
        for path in run.checkpoints.glob("global_step_*"):
            if int(path.name.removeprefix("global_step_")) > 6:
                shutil.rmtree(path)
        yield run
    finally:
        run.stop()


@pytest.fixture(scope="module")
def exact_comparison(exact: RealRun, countdown_dir: Path) -> dict[str, Comparison]:
    return verify(exact.samples, exact.checkpoints, str(countdown_dir / "base_model"))


def test_every_token_enters_the_loss_with_the_log_prob_of_the_policy_that_sampled_it(
    exact_comparison: dict[str, Comparison],
) -> None:
    assert_exact(exact_comparison)


def test_prefixes_are_exactly_two_versions_old_and_none_comes_earlier(exact: RealRun) -> None:
    for step, rows in read_samples(exact.samples).items():
        assert len(rows) == 64
        assert versions_of_prefixes(rows) == ({step - 3} if step >= 3 else set())
        mixed = sum(row["prefix_length"] > 0 for row in rows)
        assert mixed == (32 if step >= 3 else 0)
        for row in rows:
            length = row["prefix_length"]
            assert row["policy_versions"] == [step - 3] * length + [step - 1] * (len(row["response_ids"]) - length)
            assert len(row["old_log_probs"]) == len(row["response_ids"]) <= 24


def test_shuffled_versions_are_noticed(exact: RealRun, countdown_dir: Path, tmp_path: Path) -> None:
    """The check itself can fail: the same log-probs, claimed for other versions."""
    rng = np.random.default_rng(0)
    for step, rows in read_samples(exact.samples).items():
        for row in rows:
            claimed = row["policy_versions"]
            row["policy_versions"] = [int((version + rng.integers(1, 6)) % 6) for version in claimed]
        (tmp_path / f"{step}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    comparisons = verify(tmp_path, exact.checkpoints, str(countdown_dir / "base_model"))
    with pytest.raises(AssertionError):
        assert_exact(comparisons)


def test_a_prefix_that_ended_is_a_complete_sample(exact: RealRun) -> None:
    rows = [row for rows in read_samples(exact.samples).values() for row in rows]
    complete = [row for row in rows if 0 < row["prefix_length"] == len(row["response_ids"])]
    assert complete
    assert all(row["response_ids"][-1] == 1 for row in complete)


def test_advantages_are_those_of_the_group(exact: RealRun) -> None:
    for rows in read_samples(exact.samples).values():
        groups: dict[str, list[dict]] = {}
        for row in rows:
            groups.setdefault(row["uid"].split("_")[0], []).append(row)
        for group in groups.values():
            scores = np.array([row["score"] for row in group])
            expected = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-6)
            assert [row["advantage"] for row in group] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_dead_vllm_worker_ends_the_run_with_its_error_within_a_minute(exact: RealRun) -> None:
    assert exact.process.returncode not in (0, None)
    assert exact.seconds_to_end < 60  # pyright: ignore[reportAttributeAccessIssue]
    assert "The vLLM engine of rollout replica 0 died" in exact.terminal
    assert "The run failed; what led to it is in log.txt" in exact.terminal


# ---------------------------------------------------------------- the same prefixes from kept weights


SNAPSHOT = (
    "algorithm=soup",
    "algorithm.soup.source=snapshot",
    "algorithm.soup.snapshot.every=1",
    "algorithm.soup.lag=2",
    "algorithm.soup.warm_start=pure",
    "algorithm.soup.prefix_length.max=16",
    "trainer.total_training_steps=6",
)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """As `exact`, with a second vLLM that serves past weights, on a logical GPU of its own."""
    placement = "algorithm.soup.snapshot.placement=standalone"
    run = RealRun(tmp_path_factory.mktemp("snapshot"), clean_environ, *SNAPSHOT, placement)
    assert run.finish(STARTED + 60) == 0, run.log[-4000:]
    return run


def test_kept_weights_give_prefixes_of_exactly_the_version_that_they_claim(
    snapshot: RealRun, countdown_dir: Path
) -> None:
    assert_exact(verify(snapshot.samples, snapshot.checkpoints, str(countdown_dir / "base_model")))
    for step, rows in read_samples(snapshot.samples).items():
        assert versions_of_prefixes(rows) == ({step - 3} if step >= 3 else set())
        assert sum(row["prefix_length"] > 0 for row in rows) == (32 if step >= 3 else 0)


def test_standalone_no_step_waits_for_its_prefixes_once_engines_are_warm(snapshot: RealRun) -> None:
    metrics = snapshot.metrics("soup")
    assert sum(values["soup/cost/seed_requests"] for values in metrics.values()) == 4 * 32
    assert sum(values["soup/cost/seeds_lost"] for values in metrics.values()) == 0
    assert metrics[5]["soup/snapshots/kept"] == 2  # what lag 2 needs
    assert metrics[6]["soup/snapshots/waited_s"] < metrics[6]["timing_s/step"] / 2


def quantiles(run: RealRun, base_model: Path) -> np.ndarray:
    """For each prefix token, where it lies in the distribution of the policy that it claims: uniform if true.

    The probability of all smaller token ids, plus a random share of its own.
    """
    rng, places = np.random.default_rng(0), []
    rows = [row for rows in read_samples(run.samples).values() for row in rows if row["prefix_length"]]
    for version in {row["policy_versions"][0] for row in rows}:
        folder = run.checkpoints / f"global_step_{version}" / "actor" / "huggingface" if version else base_model
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for row in (row for row in rows if row["policy_versions"][0] == version):
            start, length = len(row["prompt_ids"]), row["prefix_length"]
            with torch.no_grad():
                logits = model(torch.tensor([row["prompt_ids"] + row["response_ids"][:length]])).logits[0]
            probabilities = logits[start - 1 : start + length - 1].double().softmax(-1).numpy()
            for token, distribution in zip(row["response_ids"], probabilities, strict=False):
                places.append(distribution[:token].sum() + rng.random() * distribution[token])
    return np.array(places)


def test_both_sources_sample_from_the_distribution_of_the_policy_that_they_claim(
    exact: RealRun, snapshot: RealRun, countdown_dir: Path
) -> None:
    """Equivalence of lookahead and snapshot; their log-probs are compared exactly above."""
    samples = [quantiles(run, countdown_dir / "base_model") for run in (exact, snapshot)]
    assert min(map(len, samples)) > 500
    for sample in samples:
        assert distance_from_uniform(sample) < UNLIKELY
        assert distance_from_uniform(sample**1.35) > UNLIKELY  # such a change would be noticed


def distance_from_uniform(sample: np.ndarray) -> float:
    """Kolmogorov's statistic, times the root of the sample's size."""
    expected = (np.arange(len(sample)) + 0.5) / len(sample)
    return float(np.abs(np.sort(sample) - expected).max() * np.sqrt(len(sample)))


def test_a_resumed_run_goes_on_with_its_past_weights(
    snapshot: RealRun, tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path
) -> None:
    """The other placement and the other storage: on the trainer's own (logical) GPU, from files."""
    snapshot.copy_checkpoints(tmp_path, up_to=4)
    colocated = ["algorithm.soup.snapshot.placement=colocated", "algorithm.soup.snapshot.storage=disk"]
    run = RealRun(tmp_path, clean_environ, *SNAPSHOT, *colocated, "trainer.resume_mode=auto")
    assert run.finish(STARTED + 60) == 0, run.log[-4000:]
    samples = read_samples(run.samples)
    assert {step: versions_of_prefixes(rows) for step, rows in samples.items()} == {5: {2}, 6: {3}}
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))
    assert list((run.checkpoints / "past_weights").rglob("*.safetensors"))


# ---------------------------------------------------------------- prefixes of earlier visits


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """24 prompts, eight a step: they come again every third step. Not with the default ratio."""
    overrides = ["algorithm.soup.source=replay", "algorithm.soup.mixed_share=0.75", "data.train_max_samples=24"]
    overrides += ["trainer.total_epochs=100", "trainer.total_training_steps=9", "algorithm.soup.prefix_length.max=16"]
    overrides += ["algorithm.soup.ratio=shaped", "algorithm.soup.behavior_log_probs=trainer"]
    run = RealRun(tmp_path_factory.mktemp("replay"), clean_environ, "algorithm=soup", *overrides)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_replayed_tokens_keep_the_version_that_sampled_them(replay: RealRun, countdown_dir: Path) -> None:
    assert_exact(verify(replay.samples, replay.checkpoints, str(countdown_dir / "base_model")))
    samples = read_samples(replay.samples)
    assert all(versions_of_prefixes(samples[step]) == set() for step in (1, 2, 3))
    assert all(sum(row["prefix_length"] > 0 for row in samples[step]) == 48 for step in range(4, 10))
    several = [row for row in samples[9] if len(set(row["policy_versions"][: row["prefix_length"]])) > 1]
    assert several  # began at one visit, went on at the next, and is replayed at the third


def test_a_replayed_prefix_is_one_that_its_prompt_left_at_its_last_visit(replay: RealRun) -> None:
    samples = read_samples(replay.samples)
    for step in range(4, 10):
        for row in samples[step]:
            prefix = row["response_ids"][: row["prefix_length"]]
            earlier = [
                r for s in range(max(step - 5, 1), step) for r in samples[s] if r["prompt_ids"] == row["prompt_ids"]
            ]
            assert any(r["response_ids"][: len(prefix)] == prefix for r in earlier)


def test_a_shaped_ratio_has_no_clip_on_the_prefix_and_gradients_flow(replay: RealRun) -> None:
    for step, metrics in replay.metrics("soup").items():
        assert metrics["actor/grad_norm"] > 0
        assert (metrics["soup/loss/prefix/tokens"] > 0) == (step > 3)
        clips = [metrics[f"soup/loss/prefix/clip_fraction/{side}"] for side in ("low", "high", "dual")]
        assert clips == [0, 0, 0]
        assert metrics["soup/train/lag_2_to_3/tokens"] > 0 or step <= 3


# ---------------------------------------------------------------- everything at once: ramp, cut, refills, failures


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
    assert all(0 < m["soup/prefix/engine_mismatch/max"] < TOLERANCE for m in metrics)


# ---------------------------------------------------------------- weights that change in the middle of a response


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    """verl's trainer with partial rollouts; responses are long and the engine narrow, so that some are interrupted."""
    overrides = [
        "trainer.v1.trainer_mode=soup_colocate_async",
        "algorithm.soup.lag=2",
        "algorithm.soup.warm_start=pure",
    ]
    overrides += ["actor_rollout_ref.rollout.max_num_seqs=24", "actor_rollout_ref.rollout.ignore_eos=true"]
    overrides += ["data.max_response_length=40", "trainer.total_training_steps=6"]
    overrides += [f"reward.custom_reward_function.path={PARITY}"]
    run = RealRun(tmp_path_factory.mktemp("interrupted"), clean_environ, "algorithm=soup", *overrides)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_interrupted_responses_enter_with_the_log_prob_of_each_tokens_own_version(
    interrupted: RealRun, countdown_dir: Path
) -> None:
    samples = read_samples(interrupted.samples)
    # Samples 4 to 7 of a prompt never have a historical prefix: what changed their version was a weight sync.
    pure = [row for rows in samples.values() for row in rows if int(row["uid"].rsplit("_", 2)[1]) >= 4]
    assert any(len(set(row["policy_versions"])) > 1 for row in pure)
    assert all(row["policy_versions"] == sorted(row["policy_versions"]) for row in pure)
    for comparison in verify(interrupted.samples, interrupted.checkpoints, str(countdown_dir / "base_model")).values():
        assert comparison.claimed
        # Behind the end of a text, log-probs are so large that float32 rounds them more coarsely.
        assert max(comparison.claimed) < 10 * TOLERANCE
        assert all(max(differences) > FAR for differences in comparison.others.values())


# ---------------------------------------------------------------- resume


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
    import pandas as pd

    rows = pd.read_parquet(countdown_dir / "data" / "train.parquet")["reward_model"]
    return [{"numbers": list(row["ground_truth"]["numbers"]), "target": row["ground_truth"]["target"]} for row in rows]


# ---------------------------------------------------------------- the twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    overrides = ["trainer.total_training_steps=3", "trainer.test_freq=3", "trainer.validation_data_dir=validation"]
    run = RealRun(tmp_path_factory.mktemp("twin"), clean_environ, "algorithm=grpo", *overrides)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_the_twin_is_grpo(twin: RealRun, countdown_dir: Path) -> None:
    comparison = verify(twin.samples, twin.checkpoints, str(countdown_dir / "base_model"))
    assert comparison["prefix"].claimed == []
    assert max(comparison["continuation"].claimed) < TOLERANCE
    assert all(metrics["soup/cost/seed_requests"] == 0 for metrics in twin.metrics("grpo").values())


def test_the_terminal_shows_progress_and_the_result(twin: RealRun) -> None:
    for words in (
        "vLLM starts",
        "step 3/3: reward",
        "grpo.jsonl: 3 steps",
        "validation, never mixed",
        "in checkpoints",
    ):
        assert words in twin.terminal
    assert "step:3 - " not in twin.terminal
    assert "step:3 - " in (twin.folder / "log.txt").read_text()
    assert (twin.folder / "runs/countdown/grpo.png").stat().st_size > 10000


def test_engine_and_trainer_agree(twin: RealRun) -> None:
    mismatch = [m["soup/train/continuation/engine_mismatch/max"] for m in twin.metrics("grpo").values()]
    assert 0 < max(mismatch) < TOLERANCE


def test_validation_is_reported_and_dumped(twin: RealRun) -> None:
    assert "val-core/countdown/acc/mean@16" in twin.metrics("grpo")[3]
    rows = [json.loads(line) for line in (twin.folder / "validation" / "3.jsonl").read_text().splitlines()]
    assert len(rows) == 32 * 16
