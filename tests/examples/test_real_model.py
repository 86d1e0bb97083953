"""SmolLM2 through the whole real path, as its README says: training, verify, show. Run by `make real-model`."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real_run import RealRun
from transformers import AutoConfig, AutoTokenizer

from recipe.soup.records.json_lines import read_json_lines
from recipe.soup.records.metrics_file import read_metrics
from recipe.soup.tools.verify import read_samples

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "runs/smollm2"
EXAMPLE = (
    "algorithm=soup",
    "example=smollm2",
    f"actor_rollout_ref.model.path={BUILT}/model",
    f"data.train_files={BUILT}/data/train.parquet",
    f"data.val_files={BUILT}/data/val.parquet",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
)
OVERRIDES = (
    *EXAMPLE,
    "hardware=cpu",
    "algorithm.soup.warm_start=pure",
    "trainer.save_freq=1",
    "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
    "trainer.default_local_dir=checkpoints",
    "trainer.rollout_data_dir=samples",
    "hydra.callbacks.console.log=log.txt",
)
MINUTES_15 = 900.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clean_environ: dict[str, str]) -> RealRun:
    for path in (BUILT / "model/model.safetensors", BUILT / "data/train.parquet"):
        assert path.exists(), f"no {path}: `make real-model` builds it first."
    run = RealRun(tmp_path_factory.mktemp("smollm2"), clean_environ, common=OVERRIDES)
    assert run.finish(MINUTES_15) == 0, run.log[-4000:]
    return run


def call(module: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    print(f"{done.stdout}\n{module} {arguments[0]}: {time.monotonic() - began:.0f} s")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done


def test_a_text_ends_where_the_model_ends_it() -> None:
    """The file names another token, at which the trainer would find no end, and pad with what it trains on."""
    tokenizer = AutoTokenizer.from_pretrained(BUILT / "model")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert AutoConfig.from_pretrained(BUILT / "model").eos_token_id == tokenizer.eos_token_id


def test_every_token_entered_the_loss_under_the_policy_that_sampled_it(run: RealRun) -> None:
    where = ["--samples", str(run.samples), "--checkpoints", str(run.checkpoints), "--base-model", f"{BUILT}/model"]
    bounds = ["--mean", "2e-5", "--largest", "2e-4"]
    assert "exact: all bounds are kept" in call("recipe.soup.tools.cli", "verify", *where, *bounds).stdout


def test_half_of_the_samples_are_mixed_and_each_token_has_its_version(run: RealRun) -> None:
    for step, rows in read_samples(run.samples).items():
        assert len(rows) == 32
        assert sum(row["prefix_length"] > 0 for row in rows) == (16 if step >= 3 else 0)
        for row in rows:
            length, whole = row["prefix_length"], len(row["response_ids"])
            assert row["policy_versions"] == [step - 3] * length + [step - 1] * (whole - length)


def test_history_is_shown(run: RealRun) -> None:
    shown = call("recipe.soup.tools.cli", "show", run.folder, "--step", 4, "--brief").stdout
    assert shown.count("⟦") >= 16
    assert "Answer with the number only." in shown


def test_a_checkpoint_is_evaluated(run: RealRun, tmp_path: Path) -> None:
    """256 samples of prompts of 45 tokens: more than one batch of vLLM holds."""
    data, reward = BUILT / "data/val.parquet", "pkg://examples.smollm2.reward"
    size = ["--samples", 4, "--limit", 64, "--max-tokens", 24]
    call(
        "recipe.soup.tools.cli",
        "eval",
        run.checkpoints / "global_step_4",
        data,
        "--reward",
        reward,
        *size,
        "--out",
        tmp_path,
    )
    rows = read_json_lines(tmp_path / "val.jsonl")
    assert len(rows) == 256
    assert {row["tokens"] for row in rows} <= set(range(1, 25))


def test_the_lab_trains_it(tmp_path: Path) -> None:
    """With rewards that differ: of the example's own 32 samples often none is right, and then nothing is learned."""
    rewards = "reward.custom_reward_function.path=pkg://benchmarks.hash_reward"
    call("recipe.soup.lab", *EXAMPLE, rewards, "trainer.total_training_steps=1", cwd=tmp_path)
    [metrics] = read_metrics(tmp_path / "runs/smollm2/soup-lab.jsonl").values()
    assert metrics["actor/grad_norm"] > 0
