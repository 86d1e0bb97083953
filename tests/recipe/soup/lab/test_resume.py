"""A lab run that goes on with other settings: what trains is what these settings allow, from the first step on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipe.soup.lab.driver import Lab
from recipe.soup.prefixes.source import BANK_FILE
from verl_ext.health import NOTICE, RunEndedError

ROLLOUT = "actor_rollout_ref.rollout"
SOUP = "algorithm.soup"
BASE = (
    "data.train_batch_size=4",
    "data.val_max_samples=4",
    "data.train_max_samples=8",
    "trainer.total_epochs=20",
    "trainer.total_training_steps=12",
    "trainer.logger=[]",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=5",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    f"{ROLLOUT}.n=4",
    f"{SOUP}.lag=3",
    f"{SOUP}.warm_start=fill",
)


def lab(composed: Any, folder: Path, *overrides: str) -> Lab:
    where = [f"trainer.default_local_dir={folder}", "trainer.resume_mode=auto"]
    return Lab(composed("example=countdown", "algorithm=soup", *BASE, *where, *overrides))


def leave(composed: Any, folder: Path, *overrides: str) -> None:
    """A checkpoint after the fifth step."""
    run = lab(composed, folder, *overrides)
    for step in range(1, 6):
        run.step(step)
    run._save(5)


def goes_on(composed: Any, folder: Path, *overrides: str) -> list[dict[str, float]]:
    run = lab(composed, folder, *overrides)
    assert run.first_step == 6
    return [run.step(step) for step in range(6, 11)]


def lags(steps: list[dict[str, float]]) -> list[float]:
    return [metrics["soup/train/prefix/lag/max"] for metrics in steps]


def test_another_lag_and_fewer_samples(composed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(composed, tmp_path)
    steps = goes_on(composed, tmp_path, f"{SOUP}.lag=1", f"{ROLLOUT}.n=2")
    assert lags(steps) == [0, 1, 1, 1, 1]
    assert [metrics["soup/train/mixed/samples"] for metrics in steps] == [0, 4, 4, 4, 4]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(NOTICE)]
    assert len(told) == 1
    assert f"{SOUP}.lag=1 (was 3), {ROLLOUT}.n=2 (was 4)" in told[0]
    assert "prefixes 0 are used, and dropped are " in told[0]


def test_fewer_samples_alone(composed: Any, tmp_path: Path) -> None:
    leave(composed, tmp_path)
    steps = goes_on(composed, tmp_path, f"{ROLLOUT}.n=2")
    assert lags(steps) == [3] * 5
    assert [metrics["soup/train/mixed/samples"] for metrics in steps] == [4] * 5


@pytest.mark.parametrize("policy", ["lagged", "pool"])
def test_past_weights_of_a_shorter_lag_grow_to_a_longer_one(composed: Any, tmp_path: Path, policy: str) -> None:
    snapshots = [f"{SOUP}.source=snapshot", f"{SOUP}.snapshot.every=1"]
    leave(composed, tmp_path, *snapshots, f"{SOUP}.lag=1")
    steps = goes_on(composed, tmp_path, *snapshots, f"{SOUP}.lag=3", f"{SOUP}.snapshot.policy={policy}")
    if policy == "lagged":
        # The newest version that was kept, and not the base model, which would be six updates old.
        assert lags(steps) == [0, 1, 2, 3, 3]
    else:
        assert lags(steps)[0] == 0
        assert 0 < max(lags(steps)) < 5


def test_fresh_from_another_source(composed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(composed, tmp_path, f"{SOUP}.source=replay")
    with pytest.raises(RunEndedError, match=rf"{SOUP}.source=lookahead: .* made with replay.*resume_bank=fresh"):
        lab(composed, tmp_path)
    assert lags(goes_on(composed, tmp_path, f"{SOUP}.resume_bank=fresh")) == [0, 1, 2, 3, 3]
    assert "with an empty bank of prefixes" in capsys.readouterr().out
    snapshots = [f"{SOUP}.source=snapshot", f"{SOUP}.snapshot.every=1", f"{SOUP}.resume_bank=fresh"]
    assert lags(goes_on(composed, tmp_path, *snapshots)) == [0, 0, 1, 2, 3]


def test_the_command_refuses_in_one_sentence(composed: Any, tmp_path: Path, clean_environ: dict[str, str]) -> None:
    leave(composed, tmp_path)
    bank = tmp_path / "global_step_5" / BANK_FILE
    bank.write_bytes(bank.read_bytes()[:-100])
    command = [sys.executable, "-m", "recipe.soup.lab", "example=countdown", "algorithm=soup", *BASE]
    command += [f"trainer.default_local_dir={tmp_path}", "trainer.resume_mode=auto"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"trainer.default_local_dir={bank.parent}: {BANK_FILE} is torn, or no file of arrays; resume another "
        "checkpoint, or set algorithm.soup.resume_bank=fresh to begin without them."
    )
