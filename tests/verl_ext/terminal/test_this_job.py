"""Jobs of one sweep of Hydra's: each has its own log, and each is asked to stop in its own folder."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl_ext.stop_request import request_file
from verl_ext.terminal.sigterm import FinishAtSigterm

APP = """
import hydra
from hydra.core.config_store import ConfigStore

CALLBACKS = {"console": {"_target_": "verl_ext.terminal.console.QuietConsole", "log": "runs/${name}/verl.log"}}
ConfigStore.instance().store("app", {"name": "a", "hydra": {"callbacks": CALLBACKS}})

@hydra.main(version_base=None, config_name="app")
def main(config):
    print("this is", config.name, flush=True)

main()
"""


@pytest.mark.parametrize(("given", "names"), [(["--multirun", "name=a,b"], ["a", "b"]), (["name=c"], ["c"])])
def test_each_job_has_a_log_of_its_own(
    given: list[str], names: list[str], tmp_path: Path, clean_environ: dict[str, str]
) -> None:
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "app.py", *given]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = {path.relative_to(tmp_path / "runs"): path.read_text() for path in (tmp_path / "runs").rglob("*log*")}
    assert {str(path): text.strip() for path, text in logs.items()} == {f"{n}/verl.log": f"this is {n}" for n in names}


def test_a_later_job_is_asked_to_stop_in_its_own_folder(tmp_path: Path) -> None:
    """A request that an earlier run left there is taken away when it starts; Hydra made the callback of job `a`."""
    callback = FinishAtSigterm(str(tmp_path / "a"), 60.0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        request_file(tmp_path / name).touch()
    node = {"_target_": "verl_ext.terminal.sigterm.FinishAtSigterm", "folder": f"{tmp_path}/${{name}}", "seconds": 60.0}
    callback.on_job_start(OmegaConf.create({"name": "b", "hydra": {"callbacks": {"sigterm": node, "none": None}}}))
    callback._ended.set()
    assert [request_file(tmp_path / name).exists() for name in ("a", "b")] == [True, False]
