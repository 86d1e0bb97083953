"""A sweep over config groups is refused, since nothing would be checked."""

import subprocess
import sys
from pathlib import Path

import pytest

from verl_ext.plugin.hydra_source import GROUPS
from verl_ext.plugin.sweeps import refuse_swept_groups


@pytest.mark.parametrize("swept", ["algorithm=soup,grpo", "hardware=cpu,null", "algorithm=choice(soup,grpo)"])
@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_swept_group_is_refused(flag: str, swept: str) -> None:
    with pytest.raises(SystemExit, match=r"^(algorithm|hardware)=.*: Hydra makes the callbacks of a sweep without"):
        refuse_swept_groups([flag, "example=countdown", swept], GROUPS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["algorithm=soup", "hardware=cpu"],
        ["--multirun", "algorithm=soup", "data.seed=1,2", "trainer.logger=[console,file]"],
        ["-m", "real_run and not real_more"],  # pytest's
    ],
)
def test_all_else_is_let_through(arguments: list[str]) -> None:
    refuse_swept_groups(arguments, GROUPS)


def test_main_ppo_refuses_it_before_its_first_job(tmp_path: Path, clean_environ: dict[str, str]) -> None:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--multirun", "algorithm=soup,grpo", "hardware=cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("algorithm=soup,grpo: "), done.stderr[-2000:]
    assert not (tmp_path / "multirun").exists()
