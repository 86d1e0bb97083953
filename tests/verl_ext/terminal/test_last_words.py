"""The last line of a failed run's terminal, in a process of Hydra's."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl_ext.health import ENDED
from verl_ext.lost_nodes import Cluster
from verl_ext.terminal.last_words import LastWords

APP = """
import hydra
from hydra.core.config_store import ConfigStore

CALLBACKS = {"last_words": {"_target_": "verl_ext.terminal.last_words.LastWords"}}
ConfigStore.instance().store("app", {"hydra": {"callbacks": CALLBACKS, "output_subdir": None, "run": {"dir": "."}}})

@hydra.main(version_base=None, config_name="app")
def main(config):
    RAISE

main()
"""


@pytest.mark.parametrize(
    ("raised", "code", "last"),
    [
        ("raise ValueError('this is why')", 1, "The run failed: ValueError: this is why"),
        ("assert config is None", 1, "assert config is None"),
        ("print('done')", 0, "done"),
        ("raise SystemExit('refused.')", 1, "refused."),
    ],
)
def test_the_cause_stands_below_hydras_advice(raised: str, code: int, last: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP.replace("RAISE", raised))
    command = [sys.executable, "app.py"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == code, done.stdout
    assert done.stdout.strip().splitlines()[-1].endswith(last)


def test_a_sweeps_next_job_begins_without_what_the_one_before_knew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_ext.terminal.last_words.atexit.register", lambda *_: None)
    words = LastWords()
    words.on_job_start(OmegaConf.create({"trainer": {"default_local_dir": "first"}}))
    words._take({"lines": [f"The engine died. {ENDED}"]})
    words._cluster = Cluster("address", frozenset())
    assert words._logged.ended is not None
    words.on_job_start(OmegaConf.create({}))
    assert (words._cluster, words._checkpoints, words._logged.ended) == (None, None, None)
