"""Turn what a user has (a hub name, a Hugging Face folder, a checkpoint of verl) into what vLLM loads."""

import shutil
import subprocess
import sys
from pathlib import Path

from recipe.soup.errors import refuse

WEIGHTS = "*.safetensors"
SHARDS = "model_world_size_*_rank_*.pt"
MERGED = "merged"


def loadable(model: str) -> str:
    """Return the folder or the name that vLLM loads.

    A checkpoint of verl (`global_step_80`, or its folder `actor`) gives its Hugging Face weights if it was saved with
    them; else verl's own merger makes them once, in `merged` beside the shards. Weights that are older than the shards
    are those of an earlier run in the same folder, and are not used.

    Raises:
        SystemExit: there is nothing to load.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise refuse("model", model, "no such folder; give a Hugging Face folder, a checkpoint of verl or a name.")
        return model  # a name on the hub
    actor = folder / "actor" if (folder / "actor").is_dir() else folder
    if (actor / "lora_train_meta.json").exists():
        raise refuse("model", model, "holds a LoRA adapter; merge it into the base model first, with PEFT.")
    saved = _newest(actor, SHARDS)
    for candidate in (folder, actor / "huggingface", actor / MERGED):
        if any(candidate.glob(WEIGHTS)) and _newest(candidate, WEIGHTS) >= saved:
            return str(candidate)
    if not saved:
        raise refuse("model", model, f"holds neither {WEIGHTS} nor shards of verl's FSDP engines.")
    return str(_merge(actor))


def weights_fingerprint(model: str) -> str:
    """Return a fingerprint of the weights in a folder, from sizes and times; "" for a name on the hub."""
    files = sorted(Path(model).expanduser().rglob("*"))
    weights = [path for path in files if path.match(WEIGHTS) or path.match(SHARDS)]
    stats = [path.stat() for path in weights if MERGED not in path.parts]
    return " ".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)


def _newest(folder: Path, pattern: str) -> float:
    """Return the time at which the last of the files was written; 0 if there is none."""
    return max((path.stat().st_mtime for path in folder.glob(pattern)), default=0.0)


def _merge(actor: Path) -> Path:
    part, merged = actor / f"{MERGED}.part", actor / MERGED
    for leftover in (part, merged):
        shutil.rmtree(leftover, ignore_errors=True)
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    try:
        subprocess.run([*command, "--local_dir", str(actor), "--target_dir", str(part)], check=True)
    except subprocess.CalledProcessError as error:
        raise refuse("model", actor, "verl's model_merger could not merge its shards; see above.") from error
    part.rename(merged)  # renamed at the end, so that what a killed merge left is never loaded
    return merged
