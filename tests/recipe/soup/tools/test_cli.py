"""The console command: its two names, its subcommands, and the older name of one of them."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from recipe.soup.tools.cli import COMMANDS, main


def test_both_names_are_installed_and_start_the_same() -> None:
    ours = {entry.name: entry.load() for entry in entry_points(group="console_scripts") if "recipe.soup" in entry.value}
    assert ours == {"soup": main, "soup-verl": main}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code
    said = capsys.readouterr().out
    assert said.startswith(f"usage: soup-verl {command} ")
    assert f"\n  soup-verl {command} " in said  # an example


def test_the_list_of_commands_waits_for_none_of_them() -> None:
    loads = "import sys; from recipe.soup.tools.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True).stdout
    assert all(f"\n    {command} " in said for command in COMMANDS)
    assert not {"torch", "transformers", "matplotlib", "verl"} & set(said.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--samples", "{}", "--checkpoints", "{}", "--base-model", "none"], 1, "no <step>.jsonl in {}"),
        (["--samples", "{}"], 2, "usage: soup-verl verify "),
        (["--help"], 0, ""),
    ],
)
def test_the_older_name_of_verify_still_works(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipe.soup.verify", *(argument.format(tmp_path) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.startswith(says.format(tmp_path))


def test_summary_takes_a_folder_and_says_where_there_is_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.jsonl").write_text('{"step": 1, "data": {"timing_s/step": 2.0, "timing_s/gen": 1.0}}\n')
    (tmp_path / "one" / "samples").mkdir(parents=True)
    main(["summary", str(tmp_path / "one")])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/one.jsonl: 1 steps",
        "  seconds a step (median): 2.00, of which gen 1.00",
        f"  samples in {tmp_path}/one/samples",
    ]
    with pytest.raises(SystemExit, match=r"run=.*other: no metrics there"):
        main(["summary", str(tmp_path / "other")])
