"""Problems and prompts outside verl's trainer: those that its dataset and its agent loop have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import DictConfig
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.tensordict_utils import get_tensordict

from recipe.soup.prefixes.demonstrations import cell as cell_of
from recipe.soup.prefixes.demonstrations import texts_in
from recipe.soup.verl_adapter.problems import Prompts, read_problems

Compose = Callable[..., DictConfig]
ROWS = [
    {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": f"{i} 5 7=22:"}],
        "reward_model": {"style": "rule", "ground_truth": str(i)},
    }
    for i in range(4)
]
MODEL = "actor_rollout_ref.model.path"


@pytest.fixture
def base_model(countdown_dir: Path) -> str:
    return f"{MODEL}={countdown_dir}/base_model"


def written(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return f"data.val_files={path}"


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_every_format_that_verl_reads(suffix: str, composed: Compose, base_model: str, tmp_path: Path) -> None:
    problems = read_problems(composed(base_model, written(tmp_path, suffix, ROWS)), "val", None)
    assert [problem.messages for problem in problems] == [row["prompt"] for row in ROWS]
    assert [problem.ground_truth for problem in problems] == ["0", "1", "2", "3"]
    assert problems[0].data_source == "countdown"
    assert problems[0].row["extra_info"] == {}  # verl's own filling


CELLS: dict[str, list[Any]] = {
    "texts": ["3+4=7", None],
    "one a row": ["3+4=7", "4+3=7"],
    "messages": [[{"role": "assistant", "content": "3+4=7"}], None],
    "lists of one length": [["3+4=7", "4+3=7"], ["1+1=2", "2-1=1"]],
    "lists of several lengths": [["3+4=7"], []],
    "a field": [{"steps": ["3+4=7"]}, {"steps": ["1", "2", "3"]}],
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("rows", [1, 2])
def test_verls_dataset_collate_fn_and_get_tensordict_hand_a_column_on(
    name: str, rows: int, composed: Compose, base_model: str, tmp_path: Path
) -> None:
    """By which demonstrations reach the trainer."""
    cells = CELLS[name][:rows]
    data = [{**row, "target": cell} for row, cell in zip(ROWS, cells, strict=False)]
    config = composed(base_model, written(tmp_path, ".parquet", data))
    read = [problem.row for problem in read_problems(config, "val", None)]
    batch = get_tensordict(collate_fn(read))
    expected = [texts_in(cell["steps"] if name == "a field" else cell) for cell in cells]
    found = [cell_of({"target": value}, "target.steps" if name == "a field" else "target") for value in batch["target"]]
    assert [texts_in(value) for value in found] == expected


def test_the_keys_of_data_count(composed: Compose, base_model: str, tmp_path: Path) -> None:
    rows = [{"question" if key == "prompt" else key: value for key, value in row.items()} for row in ROWS]
    config = composed(base_model, written(tmp_path, ".parquet", rows), "data.prompt_key=question", "data.shuffle=false")
    config.data.val_max_samples = 2
    assert [problem.ground_truth for problem in read_problems(config, "val", None)] == ["0", "1"]
    config.data.filter_overlong_prompts, config.data.max_prompt_length = True, 3
    with pytest.raises(SystemExit, match="has no rows, or none that passes the filters"):
        read_problems(config, "val", Prompts(config).tokenizer)


def test_a_dataset_class_of_the_users_own(composed: Compose, base_model: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from verl.utils.dataset.rl_dataset import RLHFDataset\n"
        "class Mine(RLHFDataset):\n"
        "    def __len__(self): return 1\n"
    )
    own = (f"data.custom_cls.path={path}", "data.custom_cls.name=Mine")
    assert len(read_problems(composed(base_model, written(tmp_path, ".parquet", ROWS), *own), "val", None)) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data.val_files=.*: (has no rows|cannot be read)"),
        ([{**row, "prompt": "3 5 7=22:"} for row in ROWS], "a prompt is no list of messages \\('3 5 7=22:'\\)"),
        ([*ROWS, {**ROWS[0], "prompt": None}], "cannot be read|a prompt is no list of messages"),
        ([{"question": "?"}], "cannot be read \\('?prompt'?\\)"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    rows: list[dict[str, Any]], message: str, composed: Compose, base_model: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        read_problems(composed(base_model, written(tmp_path, ".parquet", rows)), "val", None)


def test_prompts_are_the_agent_loops(composed: Compose, base_model: str) -> None:
    """verl's own loop, up to the token ids that it would send to the engine."""
    from types import SimpleNamespace

    from verl.experimental.agent_loop.agent_loop import DictConfigWrap
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

    template = "{% if thinks %}2 {% endif %}{{ messages[0]['content'] }}"
    for overrides in ((), ("+data.apply_chat_template_kwargs.thinks=true",)):
        config = composed(base_model, *overrides)
        config.actor_rollout_ref.model.custom_chat_template = template if overrides else None
        ours = Prompts(config)
        loop_class: Any = SingleTurnAgentLoop
        loop = loop_class(
            DictConfigWrap(config), SimpleNamespace(), ours.tokenizer, None, None, DictConfigWrap(config.data)
        )
        messages = ROWS[3]["prompt"]
        theirs = loop.loop.run_until_complete(loop.ct_build_initial_tokens(messages))
        assert ours.ids(messages) == theirs == ours.in_training(messages)
        loop.rollout_config.prompt_length = 3
        config.actor_rollout_ref.rollout.prompt_length = 3
        assert Prompts(config).in_training(messages) == loop.loop.run_until_complete(
            loop.ct_build_initial_tokens(messages)
        )
        assert ours.tokenizer.decode(theirs).replace(" ", "").endswith("357=22:")
        assert ours.tokenizer.decode(theirs).startswith("2") == bool(overrides)


def test_a_model_that_cannot_be_asked_is_refused(composed: Compose, countdown_dir: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(SystemExit, match=rf"{MODEL}=/no/folder: no model can be read"):
        Prompts(composed(f"{MODEL}=/no/folder"))
    shutil.copytree(countdown_dir / "base_model", tmp_path / "bare")
    (tmp_path / "bare/chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match=r"its tokenizer has no chat template.*custom_chat_template"):
        Prompts(composed(f"{MODEL}={tmp_path}/bare"))


MULTI = "actor_rollout_ref.rollout.multi_turn"


def test_prompts_tell_of_the_tools_that_the_run_has(composed: Compose) -> None:
    """As verl's loop with tools does; the template writes down how many there are."""
    count = "{{ tools | length if tools else 'no' }} tools: {{ messages[0]['content'] }}"
    for example, said in (("countdown_tool", "1 "), ("countdown", " ")):
        for algorithm in ("soup", "verl"):
            config = composed(f"algorithm={algorithm}", "hardware=cpu", f"example={example}")
            config.actor_rollout_ref.model.custom_chat_template = count
            prompts = Prompts(config)
            assert prompts.tokenizer.decode(prompts.ids(ROWS[3]["prompt"])).replace("<pad>", "").startswith(said)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format", "nonsense", "no parser of calls for this model (Unknown tool parser: nonsense); choose"),
        ("function_tool_path", "broken.py", "cannot be loaded (no tools today); mend the tools."),
        ("function_tool_path", "absent.py", "cannot be loaded ("),
    ],
)
def test_tools_that_cannot_be_loaded_are_refused(
    composed: Compose, tmp_path: Path, key: str, value: str, words: str
) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('no tools today')\n")
    value = str(tmp_path / value) if value.endswith(".py") else value
    with pytest.raises(SystemExit) as refusal:
        Prompts(composed("algorithm=soup", "hardware=cpu", "example=countdown_tool", f"{MULTI}.{key}={value}"))
    assert str(refusal.value).startswith(f"{MULTI}.{key}={value}: {words}")
