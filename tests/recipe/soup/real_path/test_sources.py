"""Lookahead and snapshot give the same prefixes, exactly; a dead vLLM worker; the resume of a snapshot run."""

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
from real_run import STARTED, RealRun, assert_exact, versions_of_prefixes
from transformers import AutoModelForCausalLM

from recipe.soup.tools.exactness import Comparison
from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_run

UNLIKELY = 2.2  # Kolmogorov's statistic of a uniform sample is larger in one of ten thousand cases


# ---------------------------------------------------------------- lag 2, pure, temperature 1; then a death


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> Iterator[RealRun]:
    """Six steps, after which the run's vLLM engine is killed."""
    overrides = ["algorithm.soup.lag=2", "algorithm.soup.warm_start=pure", "algorithm.soup.prefix_length.max=16"]
    folder = tmp_path_factory.mktemp("exact")
    run = RealRun(folder, clean_environ, "algorithm=soup", *overrides, "trainer.total_training_steps=500")
    try:
        run.wait_for(run.samples / "6.jsonl", STARTED)
        run.wait_for(run.checkpoints / "global_step_6" / "data.pt", 60)
        # One process: hardware=cpu has the model in the engine's own.
        [engine] = [process for process in run.descendants() if "VLLM::" in " ".join(process.cmdline())]
        killed = time.monotonic()
        os.kill(engine.pid, signal.SIGKILL)
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
    assert exact.terminal.splitlines()[-1].startswith("The run failed: ")
    assert "The vLLM engine of rollout replica 0 died" in exact.terminal.splitlines()[-1]


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
    """The other placement and the other storage: on the trainer's own (logical) GPU, from files.

    A share of memory that no machine has does no harm where the KV cache is set by the environment.
    """
    snapshot.copy_checkpoints(tmp_path, up_to=4)
    colocated = ["algorithm.soup.snapshot.placement=colocated", "algorithm.soup.snapshot.storage=disk"]
    colocated += ["algorithm.soup.snapshot.gpu_memory_utilization=1.0", "algorithm.soup.snapshot.max_num_seqs=16"]
    run = RealRun(tmp_path, clean_environ, *SNAPSHOT, *colocated, "trainer.resume_mode=auto")
    assert run.finish(STARTED + 60) == 0, run.log[-4000:]
    samples = read_samples(run.samples)
    assert {step: versions_of_prefixes(rows) for step, rows in samples.items()} == {5: {2}, 6: {3}}
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))
    assert list((run.checkpoints / "past_weights").rglob("*.safetensors"))
