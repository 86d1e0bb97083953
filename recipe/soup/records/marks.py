"""Write responses as text in which a reader sees what is history, the present, a tool's, or a demonstration's."""

import unicodedata
from collections.abc import Sequence
from typing import Any

OPEN, CLOSE = "⟦", "⟧"
TOOL_OPEN, TOOL_CLOSE = "⟪", "⟫"
SHOWN_OPEN, SHOWN_CLOSE = "⦅", "⦆"
"""Around what is of a demonstration."""
BRACKETS = {
    (True, True): (OPEN, CLOSE),
    (False, True): ("", ""),
    (False, False): (TOOL_OPEN, TOOL_CLOSE),
    (True, False): (SHOWN_OPEN, SHOWN_CLOSE),
}
"""By whether a token was given to the step's policy to go on with, and whether a policy of ours sampled it."""


def marked(tokenizer: Any, response_ids: list[int], prefix: Sequence[bool], sampled: Sequence[bool]) -> str:
    """Return the response's text, history in brackets, and in others what a tool wrote or a demonstration says.

    Args:
        response_ids: the response's tokens.
        prefix: whether each token is older than its step's version, or of a demonstration; may be padded.
        sampled: whether a policy of ours sampled each token; may be padded.
    """
    text, start = "", 0
    kinds = [(bool(old), bool(mine)) for old, mine in zip(prefix, sampled, strict=False)]
    for end in range(1, len(response_ids) + 1):
        if end == len(response_ids) or kinds[end] != kinds[start]:
            piece = tokenizer.decode(response_ids[start:end], skip_special_tokens=True)
            before, after = BRACKETS[kinds[start]]
            text += f"{before}{piece}{after}"
            start = end
    return text


def printable(text: str) -> str:
    """Write control characters, which could drive a terminal or break a picture, as their escapes.

    Models write anything.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        else character
        for character in text
    )
