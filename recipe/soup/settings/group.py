"""What every group of settings is made of: keys with type, bounds and text, and rules between them."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError

from recipe.soup.errors import refuse


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _no_fraction(value: Any) -> Any:
    if isinstance(value, bool | float):
        raise PydanticKnownError("int_type")
    return value


Number = Annotated[float, BeforeValidator(_no_truth_value)]
"""A number or its text, `inf` included; pydantic would read true as 1."""
Whole = Annotated[int, BeforeValidator(_no_fraction)]
"""A whole number or its text; pydantic would read true as 1, and 16.0 as 16."""


def key(
    default: Any,
    meaning: str,
    *,
    origin: str = "our choice",
    when: str = "",
    advice: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """Declare one key.

    Args:
        default: its value where a config does not name it.
        meaning: one sentence.
        origin: where the key comes from: the paper, a neighbour of it, or us.
        when: when to use another value, and what to mind then.
        advice: what to do, said to a value outside the bounds.
        ge: the least value that is allowed.
        gt: a bound that every value lies above.
        le: the largest value that is allowed.
    """
    texts: dict[str, Any] = {"origin": origin, "when": when, "advice": advice}
    return Field(default, description=meaning, json_schema_extra=texts, ge=ge, gt=gt, le=le)


def text(field: FieldInfo, name: str) -> str:
    """The text of a key called `origin`, `when` or `advice`; "" if it has none."""
    texts = field.json_schema_extra
    return str(texts.get(name, "")) if isinstance(texts, dict) else ""


class Group(BaseModel):
    """Keys that stand together. A value that is assigned later is not checked."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    path: ClassVar[str] = "algorithm.soup"
    """Where its keys stand."""

    @classmethod
    def every_key(cls, start: str = "") -> Iterator[tuple[str, FieldInfo]]:
        """Every key by its name below `path`, with those of the groups inside this one."""
        for name, field in cls.model_fields.items():
            inside = field.annotation
            if isinstance(inside, type) and issubclass(inside, Group):
                yield from inside.every_key(f"{start}{name}.")
            else:
                yield f"{start}{name}", field

    def demand(self, key: str, holds: bool, why: str) -> None:
        """Check a rule that concerns other keys as well; pydantic lets the exception pass.

        Raises:
            SystemExit: it does not hold.
        """
        if not holds:
            raise refuse(f"{self.path}.{key}", attrgetter(key)(self), why)
