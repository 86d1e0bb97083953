"""The documents: a site of them builds, every link leads somewhere, the map has every file, the example runs."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)")
LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*(?:src|href)=["']?(?:https?:)?//""")
TWO_SCREENS = 110
"""Lines."""


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # With --quiet mkdocs counts no warnings, so that --strict finds none.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with --strict: no broken link, and no document that the navigation leaves out."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_documents_that_lie_beside_the_code(site: Path) -> None:
    for page in ("index.html", "docs/study/index.html", "recipe/soup/index.html", "CONTRIBUTING/index.html"):
        assert (site / page).exists()
    assert (site / "recipe/soup/algorithm/batch.py").exists()


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    assert not [page for page in site.rglob("*.html") if LOADED.search(page.read_text())]


@pytest.mark.parametrize("link", ["missing.md", "../recipe/soup/missing.py", "other.md#missing"])
def test_strict_sees_a_link_that_leads_nowhere(link: str, tmp_path: Path) -> None:
    """mkdocs lists our files by a hook, and would not complain of links that it does not know."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/mkdocs_hook.py").write_text((ROOT / "docs/mkdocs_hook.py").read_text())
    config = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(config[: config.index("nav:")])
    (tmp_path / "README.md").write_text("[here](docs/other.md)\n")
    (tmp_path / "docs/other.md").write_text("# Other\n\n[source](mkdocs_hook.py)\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    (tmp_path / "docs/other.md").write_text(f"# Other\n\n[away]({link})\n")
    assert build(tmp_path, tmp_path / "site").returncode == 1


def test_links_of_the_readme_lead_to_files() -> None:
    """Read without the site, as on a hub of repositories."""
    links = [link.partition("#")[0] for link in LINK.findall((ROOT / "README.md").read_text())]
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).is_file()] == []


def test_the_readme_is_shorter_than_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= TWO_SCREENS


def mapped() -> set[str]:
    """Every file that CONTRIBUTING.md has a line for."""
    found, folder = set(), None
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        if line.startswith("#"):
            heading = re.fullmatch(r"### `((?:recipe|verl_ext)/.*)`", line)
            folder = heading and heading.group(1)
        elif folder and (file := re.match(r"\| `([\w/]+\.py)` \|", line)):
            found.add(folder + file.group(1))
    return found


def test_the_map_has_a_line_for_every_file() -> None:
    files = [path for package in ("recipe", "verl_ext") for path in (ROOT / package).rglob("*.py")]
    assert mapped() == {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    """The file that the page on own tasks tells to save."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/your-own-task.md").read_text(), re.DOTALL)
    (tmp_path / "my_task.py").write_text(code)
    return tmp_path / "my_task.py"


def test_the_example_of_an_own_task_writes_rows_with_verls_columns_and_scores_them(
    own_task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_task.parent)
    score = runpy.run_path(str(own_task), run_name="__main__")["compute_score"]
    for name, size in (("train", 64), ("val", 16)):
        rows = pd.read_parquet(f"runs/my_task/{name}.parquet")
        assert len(rows) == size
        for row in rows.to_dict("records"):
            numbers, target = row["prompt"][0]["content"].rstrip(":").split("=")
            truth = row["reward_model"]["ground_truth"]
            assert sum(map(int, numbers.split())) == int(target) == truth
            assert score(row["data_source"], f"3+5=8,8+7={truth}", truth, row["extra_info"]) == 1.0
            assert score(row["data_source"], f"{truth}=7+8,9+9={truth + 1}", truth) == 0.0
            assert score(row["data_source"], "", truth) == 0.0
