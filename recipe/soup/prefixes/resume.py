"""Going on with the prefixes of a checkpoint: what another run left is refused, adapted or used, and told."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe.soup.bank_origin import (
    CALLS,
    LOOP,
    NOT_ALWAYS_KNOWN,
    NOTHING,
    PLACEMENT,
    SOURCE,
    TOKENIZER,
    TOOLS,
    TRAIN_FILES,
)
from recipe.soup.errors import refuse
from recipe.soup.prefixes.bank import read_origin
from recipe.soup.prefixes.files import UnreadableError, read_arrays
from recipe.soup.prefixes.fit import CUT
from recipe.soup.prefixes.past_weights import SNAPSHOT_FOLDER
from recipe.soup.prefixes.response_lengths import TYPICAL_FILE
from recipe.soup.prefixes.source import BANK_FILE, PrefixSource
from recipe.soup.prefixes.steering import STEERING_FILE
from recipe.soup.prefixes.verification import VERIFIED_FILE
from verl_ext.health import NOTICE, end_run
from verl_ext.historical_policy.snapshots import missing_file
from verl_ext.historical_policy.store import INDEX_FILE

SOUP = "algorithm.soup"
KEY = f"{SOUP}.resume_bank"
FRESH = f"{KEY}=fresh to begin without them"
ANOTHER = f"resume another checkpoint, or set {FRESH}"
REFUSED = {
    SOURCE: "each source keeps prefixes in its own way",
    f"{SOUP}.selection": "a chosen prefix is no plain sample, and another choice is another bias",
    f"{SOUP}.candidates": "a chosen prefix is no plain sample, and another choice is another bias",
    f"{SOUP}.on_eos": "what ended was kept or cut when it was sampled",
    "actor_rollout_ref.rollout.temperature": "their log-probs are at that temperature",
    "actor_rollout_ref.model.custom_chat_template": "their prompts were written otherwise",
    "data.apply_chat_template_kwargs": "their prompts were written otherwise",
    TOKENIZER: "their tokens mean something else to another tokenizer or chat template",
    LOOP: "the prompts of one had tools and those of the other had none",
    CALLS: "their first turns end where that parser sees the call of a tool",
    TOOLS: "their prompts told of other tools",
    PLACEMENT: "past versions are adapters with shared, and whole weights elsewhere",
    "data.train_batch_size": "their steps are counted in such batches",
}
"""Why prefixes cannot be used any more where the value of this key has changed."""
IN_ORDER = {
    TRAIN_FILES: "they belong to the prompts that come next there",
    "data.seed": "they belong to the prompts that come next in that order",
    "data.shuffle": "they belong to the prompts that come next in that order",
    "data.train_max_samples": "they belong to the prompts that come next in that order",
}
"""The same for prefixes that are kept by their prompt's place; `replay` keeps them by the prompt itself."""
WHOLE = f"{SOUP}.prefix_length.distribution"


def check_bank(key: str, folder: Path, now: Mapping[str, Any]) -> None:
    """Check, without loading prefixes, that a run can go on with those of a checkpoint.

    Args:
        key: what names the folder.
        now: the run's own origin (`bank_origin`).

    Raises:
        SystemExit: it cannot; what is wrong, and that `resume_bank=fresh` begins without them.
    """
    if not (folder / BANK_FILE).exists():
        why = f"this checkpoint has no {BANK_FILE}, so SOUP did not write it and its prefixes are lost"
        raise refuse(key, folder, f"{why}; resume a SOUP checkpoint, or set {FRESH}.")
    try:
        then = read_origin(folder / BANK_FILE)
        for name in (TYPICAL_FILE, STEERING_FILE, VERIFIED_FILE):
            if (folder / name).exists():
                with read_arrays(folder / name):
                    pass
        _check_past(folder, then)
    except UnreadableError as error:
        raise refuse(key, folder, f"{error}; {ANOTHER}.") from error
    changed = changes(then, now)
    in_order = {} if now.get(SOURCE) == "replay" else IN_ORDER
    for name, why in {**REFUSED, **in_order, WHOLE: "only one of the two has whole responses"}.items():
        if name in changed and (name != WHOLE or "whole" in changed[name]):
            before, value = changed[name]
            said = f"the prefixes in {folder} were made with {before}, and {why}"
            back = "put back what it was" if name in NOT_ALWAYS_KNOWN else f"go on with {before}"
            raise refuse(name, value, f"{said}; {back}, or set {FRESH}.")


def _check_past(folder: Path, then: Mapping[str, Any]) -> None:
    """Check that what the bank's run kept beside its bank is there.

    Raises:
        UnreadableError: it is not.
    """
    if then.get(f"{SOUP}.selection") == "steered" and not (folder / STEERING_FILE).exists():
        raise UnreadableError(f"it has no {STEERING_FILE}, so the controllers of selection=steered are lost")
    if then.get(f"{SOUP}.selection") == "verified" and not (folder / VERIFIED_FILE).exists():
        raise UnreadableError(f"it has no {VERIFIED_FILE}, so the prompts of its responses are lost")
    if then.get(SOURCE) == "snapshot":
        try:
            index = json.loads((folder / SNAPSHOT_FOLDER / INDEX_FILE).read_text())
        except (OSError, ValueError):
            lost = f"it has no {SNAPSHOT_FOLDER}/{INDEX_FILE} that can be read, so past weights are lost"
            raise UnreadableError(lost) from None
        if then.get(PLACEMENT) == "shared":
            for version in {*index["versions"], *index["named"].values()}:
                if (file := missing_file(folder / SNAPSHOT_FOLDER / f"version_{version}")) is not None:
                    raise UnreadableError(f"the adapter of version {version} is lost: {file} is missing")


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys that have changed since a bank was written, with both values.

    A key that one of the two does not know was added or taken away by another version, or has no effect there. A run
    that mixed nothing left no prefixes, so nothing about them has changed.
    """
    if NOTHING in (then.get(SOURCE), now.get(SOURCE)):
        return {}
    both = [(name, then[name], json.loads(json.dumps(value))) for name, value in now.items() if name in then]
    known = [(name, *values) for name, *values in both if name not in NOT_ALWAYS_KNOWN or None not in values]
    return {name: (before, value) for name, before, value in known if before != value}


def resume(source: PrefixSource, folder: Path, step: int) -> None:
    """Give a source what a checkpoint holds for it, as far as it fits the run's settings, and tell what does not.

    Args:
        step: of the checkpoint.

    Raises:
        RunEndedError: `resume_bank=strict`, and it cannot be used.
    """
    if not source.mixes:
        source.start_at(step)
        if _mixed(folder):
            print(f"{NOTICE}this run mixes nothing, so the prefixes in {folder} are left out.", flush=True)
        return
    if source.settings.resume_bank == "fresh":
        source.start_at(step)
        print(f"{NOTICE}{KEY}=fresh: the run goes on from {folder} with an empty bank of prefixes.", flush=True)
        return
    try:
        check_bank("trainer.resume_mode", folder, source.facts.origin)
        changed = changes(read_origin(folder / BANK_FILE), source.facts.origin)
        source.load(folder)
    except SystemExit as refusal:  # in a process of Ray nobody would read it
        end_run(str(refusal))
    except UnreadableError as error:
        end_run(f"{folder}: {error}; {ANOTHER}.")
    if changed:
        (found, what), counts = source.holds, source.adapt(step, changed)
        said = ", ".join(f"{name}={value} (was {before})" for name, (before, value) in changed.items())
        used = f"of its {found} {what} {source.holds[0]} are used{_listed(counts)}"
        print(f"{NOTICE}since {folder} these have changed: {said}; {used}.", flush=True)


def _mixed(folder: Path) -> bool:
    """Whether a checkpoint has prefixes, as far as can be read."""
    try:
        return read_origin(folder / BANK_FILE).get(SOURCE) != NOTHING
    except UnreadableError:
        return False


def _listed(counts: Mapping[str, int]) -> str:
    shortened = f" ({counts[CUT]} of them shortened)" if counts.get(CUT) else ""
    dropped = ", ".join(f"{count} {why}" for why, count in counts.items() if count and why != CUT)
    return f"{shortened}, and dropped are {dropped}" if dropped else shortened
