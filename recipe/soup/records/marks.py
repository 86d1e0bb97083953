"""Write responses as text in which a reader sees where history ends and the present begins, and what tools wrote."""

import unicodedata
from collections.abc import Sequence
from typing import Any

OPEN, CLOSE = "⟦", "⟧"
TOOL_OPEN, TOOL_CLOSE = "⟪", "⟫"


def marked(tokenizer: Any, response_ids: list[int], prefix: Sequence[bool], sampled: Sequence[bool]) -> str:
    """Return the response's text with each historical stretch in brackets, and in others what no policy sampled.

    Args:
        response_ids: the response's tokens.
        prefix: whether each token is older than its step's version; may be padded.
        sampled: whether a policy sampled each token; may be padded.
    """
    text, start = "", 0
    kinds = [(bool(old), bool(mine)) for old, mine in zip(prefix, sampled, strict=False)]
    for end in range(1, len(response_ids) + 1):
        if end == len(response_ids) or kinds[end] != kinds[start]:
            piece = tokenizer.decode(response_ids[start:end], skip_special_tokens=True)
            old, mine = kinds[start]
            before, after = (OPEN, CLOSE) if old else ("", "") if mine else (TOOL_OPEN, TOOL_CLOSE)
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
