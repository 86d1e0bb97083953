"""A machine that is not fit for the CPU path is told so in one sentence."""

import json
import platform
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_ext.cpu import machine
from verl_ext.plugin.callbacks import BUCKET, RequireCpuPlatform

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 10**12))
    monkeypatch.setattr(machine, "_available_memory", lambda: 100.0)


@pytest.mark.usefixtures("roomy")
class TestMachine:
    def test_a_fit_one(self, tmp_path: Path) -> None:
        assert [*machine.before_installation(tmp_path / "not/yet/there"), *machine.before_run()] == []

    def test_another_platform_and_python(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        monkeypatch.setattr(sys, "version_info", (3, 12, 1))
        machine_says, python_says = machine.before_installation(tmp_path)
        assert "arm64" in machine_says
        assert "give PYTHON=/path/to/python3.11" in python_says

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2 * 10**8))
        (sentence,) = machine.before_installation(tmp_path)
        assert "0.2 GB are free" in sentence
        assert "VENV=" in sentence
        told = list(machine.before_run())
        assert "--shm-size=2g" in told[0]
        assert str(Path.cwd()) in told[1]

    def test_too_little_memory_is_warned_of(
        self, composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        config = composed("hardware=cpu", "example=countdown")
        RequireCpuPlatform().on_job_start(config)
        assert not capsys.readouterr().err
        monkeypatch.setattr(machine, "_available_memory", lambda: 1.5)
        RequireCpuPlatform().on_job_start(config)
        assert "1.5 GB of memory are free" in capsys.readouterr().err

    def test_no_room_ends_the_run(self, composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2 * 10**8))
        with pytest.raises(SystemExit, match="--shm-size"):
            RequireCpuPlatform().on_job_start(composed("hardware=cpu", "example=countdown"))

    def test_shared_memory_must_hold_a_bucket_of_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 10**9))
        assert not [sentence for sentence in machine.before_run(64) if "/dev/shm" in sentence]
        assert "need 2327 MB: start the container with --shm-size=4g" in next(iter(machine.before_run(2048)))


class TestBucket:
    """verl asserts that each weight fits into the bucket: one that is too small is not chosen, and refused if given."""

    def model(self, folder: Path, **fields: object) -> str:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(fields))
        return f"actor_rollout_ref.model.path={folder}"

    def test_it_has_room_for_the_largest_matrix(self, composed: Callable[..., DictConfig], tmp_path: Path) -> None:
        def chosen(path: str) -> int:
            config = composed("hardware=cpu", path)
            RequireCpuPlatform().on_job_start(config)
            return OmegaConf.select(config, BUCKET)

        smollm2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
        assert chosen(self.model(tmp_path, **smollm2)) == 108  # MiB of 49152 x 576 values in float32, without a rest
        assert chosen(self.model(tmp_path, **{**smollm2, "vocab_size": 49153})) == 109
        assert chosen(self.model(tmp_path, text_config=smollm2)) == 108
        assert chosen(self.model(tmp_path, vocab_size=100, hidden_size=96, intermediate_size=256)) == 64
        assert chosen(self.model(tmp_path, vocab_size=100, hidden_size=4096, intermediate_size=16384)) == 256
        assert chosen("actor_rollout_ref.model.path=owner/not-here") == 2048
        assert chosen("actor_rollout_ref.model.path=/no/such/folder") == 2048

    def test_one_that_is_given_too_small_is_refused(self, composed: Callable[..., DictConfig], tmp_path: Path) -> None:
        path = self.model(tmp_path, vocab_size=49152, hidden_size=576)
        with pytest.raises(SystemExit, match=r"a matrix of .* has 108 MB in float32"):
            RequireCpuPlatform().on_job_start(composed("hardware=cpu", path, f"{BUCKET}=64"))
        RequireCpuPlatform().on_job_start(composed("hardware=cpu", path, f"{BUCKET}=512"))
        not_here = "actor_rollout_ref.model.path=owner/not-here"
        RequireCpuPlatform().on_job_start(composed("hardware=cpu", not_here, f"{BUCKET}=64"))


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    here = machine._available_memory()
    assert 0.1 < here < 10_000
    for name, text in {"max": "max", "current": "30000000", "stat": "anon 1\ninactive_file 20000000"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert machine._available_memory() == pytest.approx(here, rel=0.5)
    (tmp_path / "memory.max").write_text("50000000\n")
    assert machine._available_memory() == pytest.approx(0.04)


def test_it_runs_where_nothing_is_installed(tmp_path: Path) -> None:
    """The line of the Makefile, with a Python that has no packages."""
    makefile = (Path(machine.__file__).parents[2] / "Makefile").read_text()
    line = next(line for line in makefile.splitlines() if "machine.py" in line).strip().lstrip("@")
    command = line.replace("$(PYTHON)", f"{sys.executable} -S").replace("$(VENV)", str(tmp_path)).split()
    done = subprocess.run(command, cwd=Path(machine.__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or "GB are free" in done.stderr
