"""Refuse datasets that verl cannot train on, under `algorithm=soup`, `grpo` and `verl`: files, columns, number of rows.

Looks at the files' heads only. What is in the rows, `soup-verl doctor` tries.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from recipe.soup.checks.tables import MAP, MAPPING, OTHER, TEXT, Table, read_table
from recipe.soup.errors import refuse
from recipe.soup.names import OURS_FOR

ACCEPTED_LOOPS = (*OURS_FOR, *OURS_FOR.values())
"""Agent loops that make their prompt of messages; what a user's own wants is not known."""
MULTI_MEDIA = ("image_key", "video_key", "audio_key")


def check_rows(config: DictConfig) -> None:
    """Check the files of both sets.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    if own_dataset(config):
        return
    for name in ("train_files", "val_files"):
        check_named(config, name)
        rows: int | None = 0
        for key, path in local_files(config, name):
            table = read_table(key, path)
            if table.rows == 0:
                raise refuse(key, path, "has no rows; give a file that has some.")
            check_columns(config, key, path, table)
            rows = None if rows is None or table.rows is None else rows + table.rows
        remote = any("://" in file for file in files(config.data[name]))
        if name == "train_files" and rows is not None and not remote:
            _check_enough(config, rows)


def own_dataset(config: DictConfig) -> bool:
    """Whether a dataset class of the user's own reads the files, and knows what they are."""
    return OmegaConf.select(config, "data.custom_cls.path") is not None


def files(value: Any) -> list[str]:
    """Return the names under `data.train_files` or `data.val_files`, which may be one or many."""
    return [str(item) for item in (value if isinstance(value, list | tuple | ListConfig) else [value])]


def local_files(config: DictConfig, name: str) -> Iterator[tuple[str, Path]]:
    """Yield the key, and each of the files that are not on another machine."""
    for file in files(config.data[name]):
        if "://" not in file:
            yield f"data.{name}", Path(file).expanduser()


def check_named(config: DictConfig, name: str) -> None:
    """Check that a set has files at all.

    Raises:
        SystemExit: it has none.
    """
    value = config.data[name]
    if value is None or not files(value):
        why = (
            "verl reads both sets when it starts, also if it never validates; give a parquet file with verl's columns."
        )
        raise refuse(f"data.{name}", value, why)


def check_columns(config: DictConfig, key: str, path: Path, table: Table) -> None:
    """Check that a file has the columns that prompt builder and reward read.

    Raises:
        SystemExit: one is missing, or of another kind.
    """
    prompt = config.data.prompt_key
    there = f"it has {', '.join(name for name in table.columns if '.' not in name)}"
    if prompt not in table.columns:
        raise refuse("data.prompt_key", prompt, f"{path} has no such column ({there}); name the one with the prompts.")
    loop = OmegaConf.select(config, "actor_rollout_ref.rollout.agent.default_agent_loop")
    if table.columns[prompt] in (TEXT, MAPPING, OTHER) and loop in ACCEPTED_LOOPS and "agent_name" not in table.columns:
        why = f"its column `{prompt}` is no list of messages"
        raise refuse(key, path, f'{why}; make each row a list like [{{"role": "user", "content": "..."}}].')
    if _some_are_null(table, prompt) and not config.data.get("filter_overlong_prompts"):
        raise refuse(key, path, f"its column `{prompt}` is empty in some row; drop such rows.")
    if not needs_truth(config):
        return
    if "data_source" not in table.columns:
        why = f"has no column `data_source`, which verl hands to the reward ({there})"
        raise refuse(key, path, f"{why}; add one, e.g. the dataset's name.")
    truth = "reward_model.ground_truth"
    if "reward_model" not in table.columns or (table.columns["reward_model"] == MAPPING and truth not in table.columns):
        why = "has no `ground_truth` in a column `reward_model`, which verl hands to the reward"
        raise refuse(key, path, f'{why} ({there}); add {{"style": "rule", "ground_truth": ...}} to each row.')
    if table.columns["reward_model"] not in (MAPPING, MAP):
        raise refuse(
            key, path, 'its column `reward_model` is no mapping; make it {"style": "rule", "ground_truth": ...}.'
        )


def _some_are_null(table: Table, prompt: str) -> bool:
    """Whether a row has no prompt, or a message has no role."""
    return any(name == prompt or (name.startswith(f"{prompt}.") and name.endswith(".role")) for name in table.empty)


def needs_truth(config: DictConfig) -> bool:
    """Whether verl's reward managers read `data_source` and `ground_truth` of every row."""
    reward = config.reward
    if reward.reward_manager.source != "register":
        return False
    return bool(reward.custom_reward_function.path) or not reward.reward_model.enable


def _check_enough(config: DictConfig, rows: int) -> None:
    """Check that the training set fills a batch: verl drops what is left over, and divides by the number of batches."""
    at_most = config.data.get("train_max_samples", -1)
    used = min(rows, at_most) if isinstance(at_most, int) and at_most > 0 else rows
    prompts = config.data.train_batch_size
    if used < prompts:
        key = "data.train_batch_size"
        left = (
            f"data.train_max_samples={at_most} leaves {used} rows"
            if used < rows
            else f"data.train_files has {rows} rows"
        )
        raise refuse(key, prompts, f"{left}, which fill no batch; use at most that many, or more data.")
