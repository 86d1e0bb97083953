"""Recompute a run's old log-probs with plain transformers: was every ratio taken against the right policy?

Needs what verl writes when asked to: samples (`trainer.rollout_data_dir`) and a checkpoint of every step in Hugging
Face's format (`trainer.save_freq=1` and `hf_model` in `actor_rollout_ref.actor.checkpoint.save_contents`). Not for
`ratio=decoupled`, where prefixes enter with the current policy's log-probs.

Example:
    python -m recipe.soup.verify --samples runs/x/samples --checkpoints runs/x/checkpoints --base-model base
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from recipe.soup.json_lines import read_json_lines

LOGITS_AT_ONCE = 2**28
"""Values; in float32, and again as log-probs, about 2 GiB."""


@dataclass
class Comparison:
    """Absolute differences, in nats, between logged old log-probs and recomputed ones.

    Attributes:
        claimed: under the version that the run claims for each token.
        others: under every other version with a checkpoint, by how far it is from the claimed one.
    """

    claimed: list[float] = field(default_factory=list)
    others: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


def read_samples(folder: Path) -> dict[int, list[dict]]:
    """The rows of verl's JSONL dump, by step."""
    return {int(path.stem): read_json_lines(path) for path in folder.glob("*.jsonl")}


def in_batches(rows: list[dict], vocabulary: int) -> Iterator[list[dict]]:
    """The rows in their order, as many at once as have `LOGITS_AT_ONCE` logits when padded; at least one."""
    longest = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    size = max(LOGITS_AT_ONCE // (longest * vocabulary), 1)
    return (rows[start : start + size] for start in range(0, len(rows), size))


@torch.no_grad()
def response_log_probs(model: PreTrainedModel, rows: list[dict], temperature: float) -> list[np.ndarray]:
    """Log-probs of the samples' response tokens, float32, one array of shape (response_length,) per row."""
    sequences = [torch.tensor(row["prompt_ids"] + row["response_ids"], device=model.device) for row in rows]
    # Padded on the right, where a causal model does not see it.
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
    """Compare logged with recomputed log-probs.

    Args:
        samples: folder of verl's JSONL dump, one file a step.
        checkpoints: folder with `global_step_<version>/actor/huggingface`.
        base_model: version 0.
        temperature: `actor_rollout_ref.rollout.temperature` of the run.
        foreign: model folder of version -1, where prefixes came from another run's checkpoint.

    Returns:
        the comparison for tokens of the `prefix` (older than their step's version) and of the `continuation`.

    Raises:
        FileNotFoundError: no samples, or no checkpoint of a version that some token claims.
    """
    steps = read_samples(samples)
    if not steps:
        raise FileNotFoundError(f"no <step>.jsonl in {samples}; run with trainer.rollout_data_dir")
    folders = {0: Path(base_model)}
    if foreign is not None:
        folders[-1] = Path(foreign)
    for folder in checkpoints.glob("global_step_*/actor/huggingface"):
        folders[int(folder.parent.parent.name.removeprefix("global_step_"))] = folder
    wanted = {version for rows in steps.values() for row in rows for version in row["policy_versions"]}
    if missing := wanted - folders.keys():
        raise FileNotFoundError(
            f"tokens were sampled by the versions {sorted(missing)}, of which {checkpoints} has none"
        )

    comparisons = {"prefix": Comparison(), "continuation": Comparison()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for version, folder in tqdm(sorted(folders.items()), "versions", disable=None):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device)
        for step, rows in steps.items():
            computed = (
                log_probs
                for batch in in_batches(rows, model.config.vocab_size)
                for log_probs in response_log_probs(model, batch, temperature)
            )
            for row, log_probs in zip(rows, computed, strict=True):
                difference = np.abs(log_probs - np.array(row["old_log_probs"]))
                for token, claimed in enumerate(row["policy_versions"]):
                    comparison = comparisons["prefix" if claimed < step - 1 else "continuation"]
                    kept = comparison.claimed if version == claimed else comparison.others[version - claimed]
                    kept.append(float(difference[token]))
    return comparisons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, required=True, help="trainer.rollout_data_dir of the run")
    parser.add_argument("--checkpoints", type=Path, required=True, help="trainer.default_local_dir of the run")
    parser.add_argument("--base-model", required=True, help="actor_rollout_ref.model.path of the run")
    parser.add_argument("--temperature", type=float, default=1.0, help="actor_rollout_ref.rollout.temperature")
    parser.add_argument("--foreign", help="model folder that algorithm.soup.snapshot.policy named, if it did")
    args = parser.parse_args()
    try:
        comparisons = verify(args.samples, args.checkpoints, args.base_model, args.temperature, args.foreign)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    for segment, comparison in comparisons.items():
        if not comparison.claimed:
            print(f"{segment}: no tokens")
            continue
        largest, mean = max(comparison.claimed), fmean(comparison.claimed)
        print(f"{segment}: {len(comparison.claimed)} tokens; largest difference {largest:.1e} nats, mean {mean:.1e}")
        for distance, differences in sorted(comparison.others.items()):
            print(f"    against the version {distance:+d} from the claimed one: {max(differences):.2f}")


if __name__ == "__main__":
    main()
