"""Refuse a reward function that is not there. Its file is read, not imported: that may take long, and runs its code."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
from omegaconf import DictConfig

from recipe.soup.checks.rows import local_files, needs_truth, own_dataset
from recipe.soup.errors import first_line, refuse

KEY = "reward.custom_reward_function"
PACKAGE = "pkg://"
DEFAULT = "verl.utils.reward_score"
MANAGERS = ("naive", "dapo")
"""Reward managers that score by verl's default function where there is no other."""


def check_reward(config: DictConfig) -> None:
    """Check that the reward function is in its file; where there is none, that verl has one for the data.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    named = config.reward.custom_reward_function
    if named.path:
        _check_function(str(named.path), named.name)
    elif needs_truth(config) and config.reward.reward_manager.name in MANAGERS and not own_dataset(config):
        _check_default(config)


def _check_function(path: str, name: str | None) -> None:
    key = f"{KEY}.path"
    if name is None:
        raise refuse(f"{KEY}.name", name, "give the name of the function in that file, e.g. compute_score.")
    if path.startswith(PACKAGE):
        try:
            spec = find_spec(path.removeprefix(PACKAGE).replace("/", "."))
        except ImportError as error:
            raise refuse(key, path, f"no such module ({first_line(error)}); put its folder on PYTHONPATH.") from None
        if spec is None:
            raise refuse(key, path, "no such module; put its folder on PYTHONPATH.")
        file = Path(spec.origin) if spec.origin else None
    else:
        file = Path(path.removeprefix("file://"))
        if not file.is_file():
            raise refuse(key, path, f"no such file in {Path.cwd()}; give a file with the function {name}.")
    if file is None or file.suffix != ".py":
        return
    try:
        module = ast.parse(file.read_text())
    except (SyntaxError, ValueError) as error:
        raise refuse(key, path, f"is no Python that can be read ({first_line(error)}); mend it.") from None
    names = _defined(module)
    if names is not None and name not in names:
        functions = [node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        there = f"it has {', '.join(functions)}" if functions else "it has none"
        raise refuse(f"{KEY}.name", name, f"{path} has no such function ({there}); name the one that scores.")


def _defined(tree: ast.Module) -> set[str] | None:
    """Return the names that a module's statements bind; None where that is only known when it runs."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            if node.name == "__getattr__":
                return None
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if any(alias.name == "*" for alias in node.names):
                return None
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("globals", "exec"):
            return None
    return names


def _check_default(config: DictConfig) -> None:
    """Refuse a training set of whose sources verl's own reward function knows none."""
    known = known_sources()
    if known is None:
        return
    key, sources = "data.train_files", set()
    for _, path in local_files(config, "train_files"):
        if path.suffix != ".parquet":
            return
        try:
            sources |= set(parquet.read_table(path, columns=["data_source"])["data_source"].unique().to_pylist())
        except (pa.ArrowException, KeyError):  # values of another kind, or a column of which only verl's reader knows
            return
    if sources and not any(_has_reward(str(source), known) for source in sources):
        why = f"verl has no reward function for data_source={', '.join(sorted(map(str, sources))[:3])} of {key}"
        raise refuse(f"{KEY}.path", None, f"{why}; give the file of yours.")


def _has_reward(source: str, known: tuple[set[str], set[str]]) -> bool:
    names, beginnings = known
    return source in names or source.startswith(tuple(beginnings))


def known_sources() -> tuple[set[str], set[str]] | None:
    """Return the data sources that verl's default reward function compares with, and beginnings of such; or None.

    Read off its source, since a call would import graders and may run code.
    """
    spec = find_spec(DEFAULT)
    if spec is None or spec.origin is None:
        return None
    functions = [
        node for node in ast.walk(ast.parse(Path(spec.origin).read_text())) if isinstance(node, ast.FunctionDef)
    ]
    score = next((function for function in functions if function.name == "default_compute_score"), None)
    if score is None:
        return None
    names, beginnings = set(), set()
    for node in ast.walk(score):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "data_source":
            names |= {item.value for item in ast.walk(node) if isinstance(item, ast.Constant)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            beginnings |= {item.value for item in node.args if isinstance(item, ast.Constant)}
    return (names, beginnings) if names else None
