"""LoRA adapters on the real path: with prefixes of the current engine, and with past adapters in it."""

import os
from pathlib import Path

import pytest
from real_run import STARTED, RealRun, assert_exact, versions_of_prefixes

from recipe.soup.prefixes.past_weights import SNAPSHOT_FOLDER
from recipe.soup.tools.verify import read_samples, verify

pytestmark = pytest.mark.real_more

MODEL = "actor_rollout_ref.model"
LORA = (
    "algorithm=soup",
    *("algorithm.soup.lag=2", "algorithm.soup.warm_start=pure", "algorithm.soup.prefix_length.max=16"),
    *(f"{MODEL}.lora_rank=4", f"{MODEL}.lora_alpha=8", f"{MODEL}.target_modules=all-linear"),
    *("actor_rollout_ref.actor.optim.lr=3e-3", "trainer.total_training_steps=6"),
)
SHARED = (
    *LORA,
    *("algorithm.soup.source=snapshot", "algorithm.soup.snapshot.placement=shared", "algorithm.soup.snapshot.every=1"),
)
EVICTS = """
from verl_ext.vllm_worker import WorkerExtension

class Evicts(WorkerExtension):
    asked = 0

    def verl_ext_new_weights(self):
        super().verl_ext_new_weights()
        self.asked += 1
        if self.asked == 3:
            self.remove_lora(123)
"""
"""Loses the current policy's adapter after the third step's sync."""


def only_adapters(run: RealRun, folder: Path) -> Path:
    """The past adapters that the run's checkpoints hold, each in the place of its version's weights."""
    for path in run.checkpoints.glob(f"global_step_*/{SNAPSHOT_FOLDER}/version_*"):
        place = folder / f"global_step_{path.name.removeprefix('version_')}" / "actor"
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "huggingface").exists():
            (place / "huggingface").symlink_to(path)
    return folder


def test_lookahead_trains_unmerged_adapters(tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path) -> None:
    run = RealRun(tmp_path, clean_environ, *LORA)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))


@pytest.fixture(scope="module")
def lagged(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    run = RealRun(tmp_path_factory.mktemp("shared"), clean_environ, *SHARED)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    return run


def test_past_adapters_give_prefixes_of_exactly_the_version_that_they_claim(
    lagged: RealRun, countdown_dir: Path, tmp_path: Path
) -> None:
    """With what verl saved of each version, merged, and with the kept adapters alone, merged by PEFT."""
    base = str(countdown_dir / "base_model")
    assert_exact(verify(lagged.samples, lagged.checkpoints, base))
    adapters = only_adapters(lagged, tmp_path)
    assert {path.name for path in adapters.iterdir()} == {f"global_step_{version}" for version in range(1, 6)}
    assert_exact(verify(lagged.samples, adapters, base))
    for step, rows in read_samples(lagged.samples).items():
        assert len(rows) == 64
        assert versions_of_prefixes(rows) == ({step - 3} if step >= 3 else set())
        assert sum(row["prefix_length"] > 0 for row in rows) == (32 if step >= 3 else 0)


def test_what_is_kept_and_asked_for(lagged: RealRun) -> None:
    metrics = lagged.metrics("soup")
    assert sum(values["soup/cost/seed_requests"] for values in metrics.values()) == 4 * 32
    assert sum(values["soup/cost/seeds_lost"] for values in metrics.values()) == 0
    assert metrics[6]["soup/snapshots/kept"] == 3  # what lag 2 needs, and the current one
    assert metrics[6]["soup/bank/prefixes"] == 0
    whole = (lagged.checkpoints / "global_step_6/actor/huggingface/model.safetensors").stat().st_size
    assert 0 < metrics[6]["soup/snapshots/bytes"] / 3 < whole / 5


def test_a_resumed_run_goes_on_with_its_past_adapters(
    lagged: RealRun, tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path
) -> None:
    lagged.copy_checkpoints(tmp_path, up_to=4)
    run = RealRun(tmp_path, clean_environ, *SHARED, "trainer.resume_mode=auto")
    assert run.finish(STARTED) == 0, run.log[-4000:]
    samples = read_samples(run.samples)
    assert {step: versions_of_prefixes(rows) for step, rows in samples.items()} == {5: {2}, 6: {3}}
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))


def test_each_prompt_of_a_pool_has_an_adapter_of_its_own(
    tmp_path: Path, clean_environ: dict[str, str], countdown_dir: Path
) -> None:
    pool = ("algorithm.soup.snapshot.policy=pool", "algorithm.soup.snapshot.keep=4")
    run = RealRun(tmp_path, clean_environ, *SHARED, *pool)
    assert run.finish(STARTED) == 0, run.log[-4000:]
    assert_exact(verify(run.samples, run.checkpoints, str(countdown_dir / "base_model")))
    found = {step: versions_of_prefixes(rows) for step, rows in read_samples(run.samples).items()}
    assert all(version < step - 1 for step, versions in found.items() for version in versions)
    assert max(map(len, found.values())) >= 3
    for rows in read_samples(run.samples).values():
        by_prompt: dict[str, set[int]] = {}
        for row in rows:
            by_prompt.setdefault(row["uid"].split("_")[0], set()).update(row["policy_versions"][: row["prefix_length"]])
        assert all(len(versions) <= 1 for versions in by_prompt.values())


def test_a_run_whose_engine_lost_the_current_adapter_stops_with_a_sentence(
    tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    """verl would go on, with samples of the base model."""
    (tmp_path / "evicting.py").write_text(EVICTS)
    paths = os.pathsep.join(filter(None, (str(tmp_path), clean_environ.get("PYTHONPATH"))))
    evicts = "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=evicting.Evicts"
    run = RealRun(tmp_path, {**clean_environ, "PYTHONPATH": paths}, *SHARED, evicts)
    assert run.finish(STARTED) not in (0, None)
    assert "the engine has no adapter of the current policy (number 123)" in run.terminal.splitlines()[-1]
    assert sorted(int(path.stem) for path in run.samples.glob("*.jsonl")) == [1, 2, 3]
