"""A hook of mkdocs: the site has the repository's own folders, so that a link works there as it does in the files.

mkdocs knows one folder of documents. Ours also lie at the root, beside the code and beside the benchmarks' results, and
they link to source files. With the repository's own folders, `--strict` checks every one of these links.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDERS = ("benchmarks", "docs", "examples", "hydra_plugins", "recipe", "tests", "verl_ext")
SUFFIXES = (".css", ".md", ".png", ".svg", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml")
LARGEST = 1_000_000
"""Bytes of a file."""


def shown(root: Path) -> list[str]:
    """Paths of the files that the site has, from the repository's root."""
    files = [*root.glob("*"), *(path for folder in FOLDERS for path in (root / folder).rglob("*"))]
    known = [path for path in files if path.suffix in SUFFIXES or path.name in ("LICENSE", "Makefile")]
    return sorted(str(path.relative_to(root)) for path in known if path.is_file() and path.stat().st_size < LARGEST)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs once it has listed `docs_dir`; what is left of that list is the theme's."""
    root = Path(str(config.config_file_path)).parent
    themes = [file for file in files if file.src_dir != config.docs_dir]
    ours = [File(name, str(root), config.site_dir, config.use_directory_urls) for name in shown(root)]
    return Files([*themes, *ours])
