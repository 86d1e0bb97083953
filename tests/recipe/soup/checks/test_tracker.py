"""verl's note of the last checkpoint: a torn one is refused, and one that names nothing whole, before a run starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from recipe.soup.checks.outputs import check_resume
from recipe.soup.records.earlier_runs import TRACKER

KEY = "trainer.default_local_dir"


def leave(folder: Path, *steps: int, note: str | None) -> None:
    for step in steps:
        (folder / f"global_step_{step}" / "actor").mkdir(parents=True)
        (folder / f"global_step_{step}" / "data.pt").touch()
    if note is not None:
        (folder / TRACKER).write_text(note)


def resumed(composed: Callable[..., DictConfig], folder: Path) -> DictConfig:
    return composed("algorithm=soup", "example=countdown", "trainer.resume_mode=auto", f"{KEY}={folder}")


@pytest.mark.parametrize(
    ("steps", "note", "cure"),
    [
        ((20, 40, 100), "", "has nothing, which is no whole checkpoint; write 100 into it."),  # killed while it wrote
        ((20,), "40", "has 40, which is no whole checkpoint; write 20 into it."),
        ((20,), "twenty", "has twenty, which is no whole checkpoint; write 20 into it."),
        ((), "", "there is no whole one, so remove it."),
    ],
)
def test_a_torn_note_is_refused_with_what_to_write(
    steps: tuple[int, ...], note: str, cure: str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    leave(tmp_path, *steps, note=note)
    with pytest.raises(SystemExit) as refusal:
        check_resume(resumed(composed, tmp_path))
    assert str(refusal.value).startswith(f"{KEY}={tmp_path}: its {TRACKER} ")
    assert str(refusal.value).endswith(cure)


@pytest.mark.parametrize(("steps", "note"), [((20,), "20"), ((20, 40), "20"), ((), None), ((20,), None)])
def test_a_note_of_a_whole_checkpoint_and_none_at_all_are_fine(
    steps: tuple[int, ...], note: str | None, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    leave(tmp_path, *steps, note=note)
    check_resume(resumed(composed, tmp_path))
