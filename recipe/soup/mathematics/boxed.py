r"""Find the answer in a text, which is its last `\boxed{}`. Pure Python, for the datasets and the reward."""

import re

LONGEST = 500
"""Most characters of an answer; this also bounds the search for a closing brace."""
FAR = 40
"""Most characters between the parts of one answer; a pattern with two gaps takes long on a million spaces."""

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
UNBRACED = re.compile(r"[^\s${}]+(?:\{[^{}$]*\})*")
# In `\boxed{2}$ and $\boxed{3}` or `m=\boxed{1}, n=\boxed{2}` the boxes are parts of one answer.
GAP = r"(?:[\s$,.;~&]|\\[,;:! \\]|\\q?quad(?![A-Za-z]))*"
BETWEEN_PARTS = re.compile(
    rf"{GAP}(?:(?:and|or)|\\text\s*\{{[\s,]*(?:and|or)\s*\}})?{GAP}(?:[A-Za-z]\w{{0,9}}\s*=\s*)?"
)


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}` or `\fbox{}` that is not empty.

    Boxes with only a comma, "and", "or" or `x=` between them are parts of one answer, and are joined by commas:
    two guesses side by side are not one right answer.

    Returns:
        None if there is no box; "" if the last one is longer than `LONGEST` or is not closed: the response was cut off
        there, and nobody knows how the answer goes on.
    """
    matches = list(BOX.finditer(text))
    if not matches:
        return None
    parts: list[str] = []
    start = len(text)
    for match in reversed(matches):
        content, end = _content(text, match.end())
        if parts and not _are_parts(text, end, start):
            break
        if content is None:
            return ""
        if content and content not in parts:
            parts.append(content)
        if parts:
            start = match.start()
    return ", ".join(reversed(parts))


def _are_parts(text: str, end: int, start: int) -> bool:
    """Whether a box that ends at `end` and the next, which starts at `start`, are parts of one answer."""
    return 0 <= start - end <= FAR and BETWEEN_PARTS.fullmatch(text, end, start) is not None


def _content(text: str, start: int) -> tuple[str | None, int]:
    """Return the content of the box that opens at `start`, or None if it does not close, and where it ends."""
    if not text.startswith("{", start):
        match = UNBRACED.match(text, start)
        return (match[0].rstrip(".,;:"), match.end()) if match else ("", start)
    depth, position = 0, start
    for position in range(start, min(start + LONGEST + 2, len(text))):
        character = text[position]
        if character in "{}" and not _is_escaped(text, position):
            depth += 1 if character == "{" else -1
            if not depth:
                return text[start + 1 : position].strip(), position + 1
    return None, len(text)


def _is_escaped(text: str, position: int) -> bool:
    r"""Whether the character comes after an odd number of backslashes: `\}` does, `\\}` does not."""
    before = text[max(position - 8, 0) : position]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1
