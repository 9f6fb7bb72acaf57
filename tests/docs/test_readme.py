"""The README stays short, and what it promises is true."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "pip install -c constraints.txt -e . && python -m memloc_lens.benchmarks.del",
    'pip install -c constraints.txt -e ".[test]" && pytest -n logical --maxprocesses 4 --dist loadfile',
)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return load(ROOT / "docs" / "hooks.py")


def test_readme_is_short_and_has_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    for command in COMMANDS:
        assert command in lines


def test_headline_table_is_made_from_the_results(hooks):
    (shown,) = hooks.HEADLINE.findall((ROOT / "README.md").read_text())
    assert shown == hooks.headline(), "run python docs/hooks.py"


def test_every_result_of_a_page_has_its_provenance(hooks):
    pages = {page: hooks.MARKER.findall(page.read_text()) for page in (ROOT / "docs").rglob("*.md")}
    names = [name for found in pages.values() for name in found]
    assert len(names) == len(set(names)) > 0
    for name in names:
        assert "| method |" in hooks.tables(name)
        assert re.fullmatch(r"[0-9a-f]{7,40}", hooks.provenance(name)["commit"])
    kept = {file.name.removesuffix(".json") for file in (ROOT / "docs" / "results").glob("*.json")}
    assert kept == set(names)


def test_provenance_needs_all_its_fields(hooks, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    (tmp_path / "run.provenance.toml").write_text('command = "memloc del"\ncommit = "1234567"\n')
    with pytest.raises(ValueError, match="lacks machine, date"):
        hooks.provenance("run")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_exist(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            assert (ROOT / link.partition("#")[0]).exists(), link
