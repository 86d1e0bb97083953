"""Where a tool writes: refused before the work is done, rather than after."""

from pathlib import Path

from recipe.soup.checks.outputs import check_writable
from recipe.soup.errors import refuse


def check_file(key: str, path: Path) -> None:
    """Check that a file can be written at the path, and make its folder.

    Raises:
        SystemExit: it cannot.
    """
    if path.is_dir():
        raise refuse(key, path, "is a folder; give a file.")
    make_folder(key, path.parent)


def make_folder(key: str, folder: Path) -> None:
    """Make a folder.

    Raises:
        SystemExit: it cannot be made, or nothing can be written in it.
    """
    check_writable(key, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse(key, folder, f"cannot be made ({error.strerror}).") from None
