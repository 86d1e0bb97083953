"""Refuse agent loops that do not tell which version sampled which token, and what a loop with tools cannot honour."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipe.soup.checks.rows import local_files, own_dataset
from recipe.soup.checks.tables import read_table, values_of
from recipe.soup.errors import refuse
from recipe.soup.names import AGENT_NAME, ASYNC_TRAINER_MODES, OURS_FOR, TOOL_AGENT_NAME
from recipe.soup.settings import SoupSettings

ROLLOUT = "actor_rollout_ref.rollout"
LOOP = f"{ROLLOUT}.agent.default_agent_loop"
ENABLE = f"{ROLLOUT}.multi_turn.enable"
COLUMN = "agent_name"
ONE_TURN = f"set {ENABLE} to False"
TOOL_FILES = ("function_tool_path", "tool_config_path")


def check_loops(config: DictConfig) -> None:
    """Check the agent loop of a run of our trainer, mixed or not.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    loop = OmegaConf.select(config, LOOP)
    if loop not in OURS_FOR.values():
        why = "does not tell which version sampled which token"
        raise refuse(LOOP, loop, f"{why}; set it to {AGENT_NAME}, or to {TOOL_AGENT_NAME} for tools.")
    own_loops = OmegaConf.select(config, f"{ROLLOUT}.agent.agent_loop_config_path")
    if own_loops is not None:
        why = "loops of one's own do not tell which version sampled which token, and may return several outputs"
        raise refuse(f"{ROLLOUT}.agent.agent_loop_config_path", own_loops, f"{why}; drop it.")
    if loop == AGENT_NAME and OmegaConf.select(config, ENABLE):
        raise refuse(ENABLE, True, f"{LOOP}={AGENT_NAME} has one turn; leave that to this key, or {ONE_TURN}.")
    turns = f"{ROLLOUT}.multi_turn"
    if loop == TOOL_AGENT_NAME and all(OmegaConf.select(config, f"{turns}.{name}") is None for name in TOOL_FILES):
        raise refuse(f"{turns}.{TOOL_FILES[0]}", None, f"{loop} has no tools to call; name a file, or {ONE_TURN}.")
    for section in (turns, "data"):
        for name in TOOL_FILES:
            _check_tool_file(f"{section}.{name}", OmegaConf.select(config, f"{section}.{name}"), loop)
    _check_column(config, loop)


def _check_tool_file(key: str, path: str | None, loop: str) -> None:
    if path is None:
        return
    if loop == AGENT_NAME:
        raise refuse(key, path, f"{AGENT_NAME} has one turn and calls no tools; set {ENABLE} to True, or drop it.")
    # verl looks for a relative one in its own folder as well.
    if not isinstance(path, str) or (Path(path).is_absolute() and not Path(path).is_file()):
        raise refuse(key, path, "no such file; give one with tools.")


def _check_column(config: DictConfig, loop: str) -> None:
    """verl lets each row choose its loop. Ours of the same kind takes its place, but all rows must be of one kind."""
    if own_dataset(config):
        return
    for name in ("train_files", "val_files"):
        for key, path in local_files(config, name):
            if not path.exists() or COLUMN not in read_table(key, path).columns:
                continue
            for value in sorted(values_of(path, COLUMN)):
                ours = OURS_FOR.get(value, value)
                if ours == loop:
                    continue
                advice = f"set {ENABLE} to {ours == TOOL_AGENT_NAME}, or remove the column"
                why = f"asks for {value}, and this run has {loop} for all rows; {advice}"
                if ours not in OURS_FOR.values():
                    why = f"asks for {value}, which would bypass SOUP's agent loop; remove it from the dataset"
                raise refuse(key, path, f"its column `{COLUMN}` {why}.")


def check_tools(config: DictConfig, settings: SoupSettings) -> None:
    """Check what mixing needs of a run with tools.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    if OmegaConf.select(config, LOOP) != TOOL_AGENT_NAME:
        return
    if settings.prefix_length.distribution == "whole":
        why = "a prefix ends with the first turn, since a tool must run for real; use another distribution"
        raise refuse("algorithm.soup.prefix_length.distribution", "whole", f"{why}, such as uniform.")
    if settings.on_eos == "cut":
        raise refuse("algorithm.soup.on_eos", "cut", "would drop the token that ends the call of a tool; use keep.")
    if settings.source == "snapshot":
        why = "a historical engine does not build prompts with tools yet; use lookahead or replay"
        raise refuse("algorithm.soup.source", "snapshot", f"{why}.")
    mode = config.trainer.v1.trainer_mode
    if mode in ASYNC_TRAINER_MODES:
        why = "partial rollouts have not been tried with tools yet"
        raise refuse("trainer.v1.trainer_mode", mode, f"{why}; set it to soup, or {ENABLE} to False.")
