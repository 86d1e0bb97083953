"""Nothing runs code that somebody else wrote unless it was asked to: what ruff's S rules do not look at."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("recipe", "verl_ext", "hydra_plugins", "examples", "benchmarks")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def unsafe(code: str) -> Iterator[str]:
    """Yield the calls that may run what they read."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name == "torch.load" and given.get("weights_only") != "True":
            yield ast.unparse(node)
        if name.endswith(("np.load", "numpy.load")) and given.get("allow_pickle") != "False":
            yield ast.unparse(node)
        if name.split(".")[-1] in ("read_pickle", "to_pickle"):
            yield ast.unparse(node)
        if given.get("trust_remote_code") == "True":
            yield ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_does(path: Path) -> None:
    assert list(unsafe(path.read_text(encoding="utf-8"))) == []


# Text that is looked at, and never run: each of these the test above would find in a file.
@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_it_would_be_found(code: str) -> None:
    assert list(unsafe(code)) == [code]


def test_what_was_asked_for_is_no_fault() -> None:
    # Text as well: the user's own choice is handed on, and a file of tensors can run nothing.
    assert not list(unsafe("LLM(path, trust_remote_code=trusted)\ntorch.load(path, weights_only=True)"))
