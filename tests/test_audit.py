"""`make audit` where the service that it asks is there, and where it is not."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REACHED = """case "$*" in
*known.txt) echo "requests 2.19.0 PYSEC-2018-28 2.20.0"; exit 1;;
*) {rest};;
esac"""
CASES = {
    "not reached": (
        'echo "ray not found" >&2; exit 1',
        False,
        "cannot be reached from here, so nothing was looked up.",
    ),
    "clean": (REACHED.format(rest='echo "No known vulnerabilities found"'), True, "No known vulnerabilities found"),
    "a weakness": (REACHED.format(rest='echo "torch 2.0 PYSEC-1"; exit 1'), False, "torch 2.0 PYSEC-1"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_audit_says(case: str, tmp_path: Path) -> None:
    script, passes, said = CASES[case]
    for name in ("Makefile", "setup.py", *(path.name for path in ROOT.glob("requirements*.txt"))):
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "env" / "audit" / "bin"
    tools.mkdir(parents=True)
    for name, text in (("python", "exit 0"), ("pip-audit", script)):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "env" / ".installed").touch()
    command = ["make", "--no-print-directory", "audit", "VENV=env", "PYTHON=true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == passes, done.stderr
    assert done.stdout.splitlines()[-1].endswith(said), done.stdout
