"""`soup-verl eval` with vLLM itself."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.real_run


def test_more_prompts_than_one_batch_holds(tmp_path: Path, countdown_dir: Path, clean_environ: dict[str, str]) -> None:
    """The last prompt of a full batch would be read in two pieces, which a seeded request does not survive here."""
    [row] = pd.read_parquet(countdown_dir / "data/val.parquet").head(1).to_dict("records")
    long = [(f"{i} " + row["prompt"][0]["content"] * 30)[:200] for i in range(64)]  # a token each character
    rows = [{**row, "prompt": [{"role": "user", "content": text}]} for text in long]
    pd.DataFrame(rows).to_parquet(tmp_path / "long.parquet")
    command = [sys.executable, "-m", "recipe.soup.tools.cli", "eval", str(countdown_dir / "base_model")]
    options = ["--samples", "4", "--max-tokens", "4", "--reward", "pkg://examples.countdown.reward"]
    where = ["--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, str(tmp_path / "long.parquet"), *options, *where], env=clean_environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len((tmp_path / "out/long.jsonl").read_text().splitlines()) == 64 * 4
