"""From what a user has (a hub name, a Hugging Face folder, a checkpoint of verl) to what vLLM loads."""

import subprocess
import sys
from pathlib import Path

from recipe.soup.settings import refuse

WEIGHTS = "*.safetensors"
MERGED = "merged"


def loadable(model: str) -> str:
    """The model as vLLM takes it.

    A checkpoint of verl (`global_step_80`, or its folder `actor`) gives its Hugging Face weights if it was saved with
    them; else verl's own merger makes them once, in `merged` beside the shards.

    Raises:
        SystemExit: there is nothing to load; one sentence.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise refuse("model", model, "no such folder; give a Hugging Face folder, a checkpoint of verl or a name.")
        return model  # a name on the hub
    actor = folder / "actor" if (folder / "actor").is_dir() else folder
    for candidate in (folder, actor / "huggingface", actor / MERGED):
        if any(candidate.glob(WEIGHTS)):
            return str(candidate)
    if not any(actor.glob("model_world_size_*_rank_*.pt")):
        raise refuse("model", model, f"holds neither {WEIGHTS} nor shards of verl's FSDP engines.")
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    subprocess.run([*command, "--local_dir", str(actor), "--target_dir", str(actor / MERGED)], check=True)
    return str(actor / MERGED)
