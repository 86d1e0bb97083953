"""Files of plain arrays in a checkpoint: never half written, and what cannot be read is said in words."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from recipe.soup.errors import first_line


class UnreadableError(Exception):
    """A file that nobody can go on with; its words say what it is instead."""


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write one .npz; a run that is killed meanwhile leaves the former one, or none."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextmanager
def read_arrays(path: Path) -> Iterator[Any]:
    """Open what `write_arrays` wrote.

    Raises:
        UnreadableError: it is torn, of another kind, or lacks something.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):  # its directory stands at the end, which a torn file lacks
                raise UnreadableError(f"{path.name} is torn, or no file of arrays")
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UnreadableError(f"{path.name} cannot be read ({first_line(error)})") from error
