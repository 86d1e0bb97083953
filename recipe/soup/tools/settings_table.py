"""Write the tables in recipe/soup/README.md from the model of the settings.

python -m recipe.soup.tools.settings_table
"""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from recipe.soup.settings import SoupSettings
from recipe.soup.settings.group import Whole, text

README = Path(__file__).parents[1] / "README.md"
MARKED = re.compile(r"(<!-- settings: (.*?) -->\n\n).*?(\n<!-- end of settings -->)", re.DOTALL)
"""A table stands between these; the first names its keys, or groups of keys."""
HEAD = "| key | default | values | meaning | from | when, and what to mind |\n|---|---|---|---|---|---|\n"


def with_tables(page: str) -> str:
    """The page with all its tables of settings made anew.

    Raises:
        KeyError: a table names a key that there is not.
    """
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2].split())}{found[3]}", page)


def table(names: list[str]) -> str:
    """A table of these keys, or of the keys in these groups."""
    paths: dict[int, tuple[FieldInfo, list[str]]] = {}
    for name in names:
        keys = [(path, field) for path, field in SoupSettings.every_key() if f"{path}.".startswith(f"{name}.")]
        if not keys:
            raise KeyError(name)
        for path, field in keys:
            paths.setdefault(id(field), (field, []))[1].append(path)
    return HEAD + "".join(_row(_together(same), field) for field, same in paths.values())


def _together(paths: list[str]) -> str:
    """Keys of groups of one kind, as one: `schedules.{mixed_share,lag}.end`."""
    parts = [list(dict.fromkeys(part)) for part in zip(*(path.split(".") for path in paths), strict=True)]
    return ".".join(part[0] if len(part) == 1 else f"{{{','.join(part)}}}" for part in parts)


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _value(field.default), _values(field), field.description, text(field, "origin"))
    return f"| {' | '.join(map(str, (*cells, text(field, 'when'))))} |\n"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else f"`{value}`" if isinstance(value, str) else str(value)


def _values(field: FieldInfo) -> str:
    """Choices, or type and bounds."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    if field.annotation is str:
        return "text"
    words = "whole number" if field.annotation is int or Whole in get_args(field.annotation) else "number"
    for bound in field.metadata:
        if isinstance(bound, Ge):
            words += f", at least {bound.ge}"
        elif isinstance(bound, Gt):
            words += f" above {bound.gt}"
        elif isinstance(bound, Le):
            words += f", at most {bound.le}"
    return f"{words}, or null" if field.default is None else words


def main() -> None:
    """Write the file."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
