"""Problems and prompts for drivers that are not verl's trainer: read by verl's dataset, built by verl's builder."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from omegaconf import DictConfig

from recipe.soup.errors import first_line, refuse, root_cause
from recipe.soup.names import TOOL_AGENT_NAME
from recipe.soup.records.problems import Problem

Messages = Sequence[dict[str, str]]
COLUMNS = "give a parquet, json or jsonl file with verl's columns"


class Prompts:
    """A model's tokenizer and chat template, as verl's agent loops use them.

    Args:
        config: verl's whole config: `actor_rollout_ref.model` and `data`.

    Attributes:
        tokenizer: with verl's padding token and the template of `custom_chat_template`, if there is one.

    Raises:
        SystemExit: no model can be read there, or it has no chat template; one sentence.
    """

    def __init__(self, config: DictConfig) -> None:
        from verl.utils.config import omega_conf_to_dataclass
        from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

        key, path = "actor_rollout_ref.model.path", config.actor_rollout_ref.model.path
        try:
            model: Any = omega_conf_to_dataclass(config.actor_rollout_ref.model)
        except Exception as error:  # Hydra's, around whatever transformers raises
            why = f"no model can be read from there, a folder or the hub ({first_line(root_cause(error))})"
            raise refuse(key, path, f"{why}; download it first where there is a network.") from None
        self.tokenizer: Any = model.tokenizer
        if not self.tokenizer.chat_template:
            why = "its tokenizer has no chat template, in which problems are asked"
            raise refuse(key, path, f"{why}; give one as actor_rollout_ref.model.custom_chat_template.")
        if self.tokenizer.eos_token_id is None:
            raise refuse(key, path, "its tokenizer has no eos_token, so no response would end; set one in its folder.")
        self._longest = int(config.actor_rollout_ref.rollout.prompt_length)
        self._tools = tool_schemas(config, self.tokenizer)
        self._builder = create_continuous_token_builder(
            self.tokenizer,
            hf_model_type=model.hf_config.model_type,
            chat_template_kwargs=config.data.get("apply_chat_template_kwargs") or {},
            processor=model.processor,
        )

    def ids(self, messages: Messages) -> list[int]:
        """Build the token ids of a prompt."""
        return self._builder.build_initial_tokens(list(messages), tools=self._tools)

    def in_training(self, messages: Messages) -> list[int]:
        """Build a prompt as verl's agent loop does: of one that is too long, the beginning is cut off."""
        return self.ids(messages)[-self._longest :]


def tool_schemas(config: DictConfig, tokenizer: Any) -> list[dict[str, Any]] | None:
    """Load the run's tools; returns what prompts tell the model of them, or None if its agent loop calls none.

    Raises:
        SystemExit: the tools cannot be loaded, or there is no such parser of calls; one sentence.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.agent.default_agent_loop not in ("tool_agent", TOOL_AGENT_NAME):
        return None
    from verl.experimental.agent_loop.tool_parser import ToolParser
    from verl.tools.tool_registry import load_all_tools
    from verl.utils.import_utils import resolve_config_path

    turns = rollout.multi_turn
    paths = {name: turns[name] for name in ("function_tool_path", "tool_config_path") if turns.get(name)}
    try:
        none = dict.fromkeys(("function_tool_path", "tool_config_path"))
        tools = load_all_tools(**{**none, **{name: resolve_config_path(path) for name, path in paths.items()}})
    except Exception as error:  # of the user's own code
        key, value = next(iter(paths.items()))
        why = f"cannot be loaded ({first_line(root_cause(error)).rstrip('.')}); mend the tools"
        raise refuse(f"actor_rollout_ref.rollout.multi_turn.{key}", value, f"{why}.") from error
    try:
        ToolParser.get_tool_parser(turns.format, tokenizer)
    except Exception as error:  # a parser may want special tokens that the model has not
        why = f"no parser of calls for this model ({first_line(root_cause(error)).rstrip('.')}); choose another one"
        raise refuse("actor_rollout_ref.rollout.multi_turn.format", turns.format, f"{why}.") from error
    return [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in tools]


def read_problems(config: DictConfig, key: str, tokenizer: Any) -> list[Problem]:
    """Read a dataset as verl does: its formats, `data.prompt_key`, a dataset class of the user's own, filters, limits.

    Args:
        config: verl's whole config.
        key: `train` or `val`, of `data.{key}_files` and `data.{key}_max_samples`.
        tokenizer: counts the tokens of prompts, if `data.filter_overlong_prompts` is on.

    Raises:
        SystemExit: the files cannot be read, have no rows, or rows without messages; one sentence.
    """
    from verl.trainer.ppo.utils import create_rl_dataset

    files, limit = config.data[f"{key}_files"], config.data.get(f"{key}_max_samples", -1)
    where = f"data.{key}_files"
    try:
        with redirect_stdout(StringIO()):  # how many rows, for each file
            dataset: Any = create_rl_dataset(files, config.data, tokenizer, None, key == "train", limit)
            rows = [dataset[i] for i in range(len(dataset))]
    except Exception as error:  # of many kinds: formats, columns, a class of the user's own
        raise refuse(where, files, f"cannot be read ({first_line(root_cause(error))}); {COLUMNS}.") from error
    if not rows:
        raise refuse(where, files, f"has no rows, or none that passes the filters of `data`; {COLUMNS}.")
    return [Problem(_messages(row, where, files), row) for row in rows]


def _messages(row: dict[str, Any], key: str, files: Any) -> list[dict[str, str]]:
    messages = row["raw_prompt"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        why = f"a prompt is no list of messages ({str(messages)[:40]!r})"
        raise refuse(
            key, files, f"{why}; write [{{'role': 'user', 'content': ...}}], or name its column as data.prompt_key."
        )
    return messages
