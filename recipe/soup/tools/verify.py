"""`soup-verl verify`: recompute a run's old log-probs, and compare them with those that entered the loss."""

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from recipe.soup.algorithm.batch import NOBODY
from recipe.soup.errors import first_line, refuse
from recipe.soup.records.json_lines import NUMBER, dumps, read_json_lines
from recipe.soup.tools.adapters import ADAPTER, has_adapters, merged, with_adapter
from recipe.soup.tools.exactness import SEGMENTS, Bounds, Comparison, Place, broken

EXAMPLES = """bounds that fit, in float32:
  the toy model of a third of a million parameters    the defaults
  a language model (135 million, 30 layers)           --mean 2e-5 --largest 2e-4

example:
  soup-verl verify --samples runs/x/samples --checkpoints runs/x/checkpoints --base-model base
"""
PER_TOKEN = ("response_ids", "policy_versions", "old_log_probs")
FORM: dict[str, Any] = dict.fromkeys(("prompt_ids", *PER_TOKEN), list)
WHOLE = ("prompt_ids", "response_ids", "policy_versions")
KIND = "a dump of our trainer's training samples (trainer.rollout_data_dir)"
LOGITS_AT_ONCE = 2**28
"""Values that are computed at a time; in float32, with their log-probs, about 2 GiB."""


def read_samples(folder: Path) -> dict[int, list[dict]]:
    """Read the rows of verl's JSONL dump, by step.

    Raises:
        SystemExit: a line is broken, or does not tell the same of all its tokens.
    """
    steps = {step: read_json_lines(path, FORM, KIND) for step, path in dumps(folder).items()}
    for step, rows in steps.items():
        for number, row in enumerate(rows, start=1):
            whole = all(isinstance(value, int) for key in WHOLE for value in row[key])
            numbers = whole and all(isinstance(value, NUMBER | None) for value in row["old_log_probs"])
            if not numbers or len({len(row[key]) for key in PER_TOKEN}) > 1:
                why = f"sample {number} has not one number for each token in each of {', '.join(PER_TOKEN)}"
                raise refuse("file", folder / f"{step}.jsonl", f"{why}; take it out, or give another run.")
    return steps


def load(folder: Path, device: str, base_model: str) -> PreTrainedModel:
    """Load a version's weights, with adapters merged into them; code that comes with a model is not run.

    Args:
        base_model: what a folder with nothing but an adapter belongs to.

    Raises:
        SystemExit: they cannot be loaded.
    """
    if folder.is_file():  # transformers would ask the hub for a model of this name
        raise refuse("model", folder, "cannot be loaded by transformers: it is a file; give the folder it is in.")
    try:
        if (folder / ADAPTER).exists():
            return with_adapter(load(Path(base_model), device, base_model), folder)
        if has_adapters(folder):
            return merged(folder).to(device)  # pyright: ignore[reportArgumentType]
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map=device, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        why = f"cannot be loaded by transformers ({first_line(error)})"
        raise refuse("model", folder, f"{why}; give a folder with config.json and weights.") from None


def tokens_of(row: dict) -> list[int]:
    """Return the tokens of prompt and response."""
    return row["prompt_ids"] + row["response_ids"]


def in_batches(rows: list[dict], vocabulary: int) -> Iterator[list[dict]]:
    """Split rows, in their order, into batches of one row or of at most `LOGITS_AT_ONCE` logits when padded."""
    longest = max((len(tokens_of(row)) for row in rows), default=1)
    size = max(LOGITS_AT_ONCE // (longest * vocabulary), 1)
    return (rows[start : start + size] for start in range(0, len(rows), size))


@torch.no_grad()
def response_log_probs(model: PreTrainedModel, rows: list[dict], temperature: float) -> list[np.ndarray]:
    """Compute the log-probs of each row's response tokens: one float32 array of shape (response_length,) per row."""
    sequences = [torch.tensor(tokens_of(row), device=model.device) for row in rows]
    # A causal model does not see padding on the right.
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float() / temperature
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return [
        values[len(row["prompt_ids"]) - 1 : len(sequence) - 1].cpu().numpy()
        for values, row, sequence in zip(log_probs, rows, sequences, strict=True)
    ]


def verify(
    samples: Path, checkpoints: Path, base_model: str, temperature: float = 1.0, foreign: str | None = None
) -> dict[str, Comparison]:
    """Compare logged with recomputed log-probs, of all tokens that a policy sampled.

    Args:
        samples: folder of verl's JSONL dump, with a file for each step.
        checkpoints: folder with `global_step_<version>/actor/huggingface`.
        base_model: folder or name of version 0.
        temperature: `actor_rollout_ref.rollout.temperature` of the run.
        foreign: model folder of version -1, where prefixes came from another run's checkpoint; or an adapter's.

    Returns:
        comparisons for the tokens of the `prefix`, which are older than their step's version, and the `continuation`.

    Raises:
        SystemExit: there are no samples, no checkpoint of a version that some token claims, or it cannot be loaded.
    """
    steps = read_samples(samples)
    if not steps:
        raise SystemExit(f"no <step>.jsonl in {samples}; run with trainer.rollout_data_dir")
    folders = {0: Path(base_model)}
    if foreign is not None:
        folders[-1] = Path(foreign)
    for folder in checkpoints.glob("global_step_*/actor/huggingface"):
        if number := re.fullmatch("global_step_([0-9]+)", folder.parent.parent.name):
            folders[int(number[1])] = folder
    wanted = {version for rows in steps.values() for row in rows for version in row["policy_versions"]} - {NOBODY}
    if missing := wanted - folders.keys():
        raise SystemExit(f"tokens were sampled by the versions {sorted(missing)}, of which {checkpoints} has none")

    comparisons = {segment: Comparison() for segment in SEGMENTS}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for version, folder in tqdm(sorted(folders.items()), "versions", disable=None):
        model = load(folder, device, base_model)
        largest = max((token for rows in steps.values() for row in rows for token in tokens_of(row)), default=0)
        if largest >= model.config.vocab_size:
            why = f"has {model.config.vocab_size} tokens, and the samples have number {largest}"
            raise refuse("model", folder, f"{why}; give the model of this run.")
        for step, rows in steps.items():
            computed = (
                log_probs
                for batch in in_batches(rows, model.config.vocab_size)
                for log_probs in response_log_probs(model, batch, temperature)
            )
            for line, (row, log_probs) in enumerate(zip(rows, computed, strict=True), start=1):
                difference = np.abs(log_probs - np.array(row["old_log_probs"], dtype=float))
                for token, claimed in enumerate(row["policy_versions"]):
                    if claimed == NOBODY:  # of no policy that is known: a tool's, or a demonstration's
                        continue
                    comparison = comparisons["prefix" if claimed < step - 1 else "continuation"]
                    if version == claimed:
                        comparison.claimed.append(float(difference[token]))
                        comparison.places.append(Place(step, line, token + 1))
                    else:
                        comparison.others[version - claimed].append(float(difference[token]))
    return comparisons


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `soup-verl verify`."""
    add, bounds = parser.add_argument, Bounds()
    add("--samples", type=Path, required=True, help="trainer.rollout_data_dir of the run")
    add("--checkpoints", type=Path, required=True, help="trainer.default_local_dir of the run")
    add("--base-model", required=True, help="actor_rollout_ref.model.path of the run")
    add("--temperature", type=float, default=1.0, help="actor_rollout_ref.rollout.temperature")
    add("--foreign", help="model folder that algorithm.soup.snapshot.policy named, if it did")
    add("--largest", type=float, default=bounds.largest, help=f"nats at the worst token (default {bounds.largest:g})")
    add("--mean", type=float, default=bounds.mean, help=f"nats in the mean of a segment (default {bounds.mean:g})")
    add(
        "--apart",
        type=float,
        default=bounds.apart,
        help="nats by which any other version must be off at its most different token; 0: other versions are not "
        f"compared (default {bounds.apart:g})",
    )
    add(
        "--expect",
        nargs="+",
        choices=SEGMENTS,
        default=SEGMENTS,
        help="segments that must have tokens (default: both); `continuation` for a run that mixes nothing",
    )


def check_run(args: argparse.Namespace) -> None:
    """Recompute a run's old log-probs with plain transformers: was every ratio taken against the right policy?

    The run must have written its samples (trainer.rollout_data_dir) and a checkpoint of every step in Hugging Face's
    format (trainer.save_freq=1, and hf_model in actor_rollout_ref.actor.checkpoint.save_contents). A run with
    algorithm.soup.ratio=decoupled cannot be checked: its prefixes enter the loss with the current policy's log-probs.

    Exits with 1, and a sentence for each bound that is broken, if the run is not exact.
    """
    if not 0 < args.temperature < math.inf:
        raise refuse("--temperature", args.temperature, "give the run's, above 0.")
    comparisons = verify(args.samples, args.checkpoints, args.base_model, args.temperature, args.foreign)
    for segment, comparison in comparisons.items():
        if not comparison.claimed:
            print(f"{segment}: no tokens")
            continue
        largest, mean = np.max(comparison.claimed), np.mean(comparison.claimed)
        print(f"{segment}: {len(comparison.claimed)} tokens; largest difference {largest:.1e} nats, mean {mean:.1e}")
        for distance, differences in sorted(comparison.others.items()):
            print(f"    against the version {distance:+d} from the claimed one: {np.max(differences):.2f}")
    if failures := list(broken(comparisons, Bounds(args.largest, args.mean, args.apart, tuple(args.expect)))):
        raise SystemExit("\n".join(failures))
    print("exact: all bounds are kept")
