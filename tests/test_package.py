"""The package as it is installed: its files, their hashes, its dependencies and their licences."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from memloc_lens import load_model
from memloc_lens.models import EMBEDDED, sources

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
READ = {
    "py.typed",
    "data/definitions.jsonl",
    "models/embedded.sha256",
    *(f"models/embedded/{name}" for name in ("config.json", "generation_config.json", "model.safetensors")),
    *(f"models/embedded/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "training.json")),
    *(f"models/embedded/{name}" for name in ("sequences.jsonl", "held_out.jsonl", "CARD.md", "LICENSE")),
    *(f"report/{name}" for name in ("page.html", "page.css", "page.js", "run.html", "pictures.html", "erasure.html")),
}
"""All files of the package but its modules."""


def names_of(requirements) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


DIRECT = names_of(PROJECT["dependencies"])
OPTIONAL = names_of(line for lines in EXTRAS.values() for line in lines) - {"memloc-lens"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> ZipFile:
    """The wheel that is built from the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (built,) = out.glob("*.whl")
    return ZipFile(built)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "memloc_lens").rglob("*.py")}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == modules | {f"memloc_lens/{name}" for name in READ}


def test_the_wheel_holds_both_licences_and_the_command(wheel):
    info = f"memloc_lens-{PROJECT['version']}.dist-info"
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    assert b"PYTHON SOFTWARE FOUNDATION LICENSE" in wheel.read(f"{info}/licenses/memloc_lens/models/embedded/LICENSE")
    assert "memloc = memloc_lens.console:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_every_file_of_the_embedded_model_has_its_hash(wheel):
    listed = dict(
        reversed(line.split("  ")) for line in wheel.read("memloc_lens/models/embedded.sha256").decode().splitlines()
    )
    held = [name for name in wheel.namelist() if name.startswith("memloc_lens/models/embedded/")]
    assert listed == {
        name.removeprefix("memloc_lens/models/"): sha256(wheel.read(name)).hexdigest() for name in held
    }, "renew the list as CONTRIBUTING.md says"


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """A copy of the embedded model that is loaded instead of it."""
    shutil.copy(EMBEDDED.with_suffix(".sha256"), tmp_path)
    shutil.copytree(EMBEDDED, tmp_path / "embedded")
    monkeypatch.setattr(sources, "EMBEDDED", tmp_path / "embedded")
    return tmp_path / "embedded"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "sequences.jsonl"])
def test_a_damaged_file_is_named(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[-2] ^= 1
    (copied / name).write_bytes(content)
    found = sha256(content).hexdigest()[:12]
    with pytest.raises(ValueError, match=rf"embedded/{name} .* is damaged: its SHA-256 is {found}.*install .* again"):
        load_model("embedded")


def test_missing_files_are_named(copied):
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"embedded/tokenizer\.json .* it is missing; install"):
        load_model()
    copied.with_suffix(".sha256").write_text("")
    with pytest.raises(ValueError, match=r"embedded\.sha256 .* it is missing or lists nothing; install"):
        load_model()


def test_what_is_imported_is_a_dependency():
    providers = packages_distributions()
    imported = {name for path in (ROOT / "memloc_lens").rglob("*.py") for name in imported_by(path)}
    foreign = imported - sys.stdlib_module_names - {"memloc_lens"}
    unknown = {
        name for name in foreign if not {canonicalize_name(own) for own in providers[name]} & (DIRECT | OPTIONAL)
    }
    assert len(foreign) > 20
    assert not unknown, "add them to pyproject.toml, constraints.txt and docs/dependencies.md"


def imported_by(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in whole | parts}


def test_each_dependency_has_its_line_and_its_pin():
    page = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    of_package, of_extras = page.split("## Of its extras")
    assert {name for name, _ in rows_of(of_package)} == DIRECT
    assert {name for name, _ in rows_of(of_extras)} == OPTIONAL
    assert names_of((ROOT / "constraints.txt").read_text("utf-8").splitlines()[1:]) >= DIRECT | OPTIONAL
    for name, licence in rows_of(page):
        family = re.findall(r"\w+", licence)[0]
        assert family in declared(name), f"{name} declares {declared(name)}, not {licence}"


def rows_of(page: str) -> list[tuple[str, str]]:
    """Name and licence in the rows of a table."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [(name, licence) for name, _, licence in rows if name != "package"]


def declared(name: str) -> str:
    """What an installed package declares about its licence."""
    found = metadata(name)
    classifiers = [each for each in found.get_all("Classifier", []) if each.startswith("License")]
    return "\n".join([found.get("License-Expression", ""), found.get("License", "")[:200], *classifiers])


def test_no_dependency_is_under_a_gpl():
    installed = with_theirs(DIRECT | OPTIONAL)
    assert len(installed) > 100
    assert "tqdm" in installed
    bound = {name for name in installed if re.search(r"\b[AL]?GPL|General Public", declared(name))}
    assert not bound


def with_theirs(names: set[str]) -> set[str]:
    """Installed packages, and all that they require here."""
    found: set[str] = set()
    while names:
        found |= names
        names = {own for name in names for own in required_by(name)} - found
    return found


def required_by(name: str) -> set[str]:
    wanted = [Requirement(line) for line in requires(name) or ()]
    here = {each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})}
    return {canonicalize_name(each) for each in here if is_installed(each)}


def is_installed(name: str) -> bool:
    try:
        return bool(metadata(name))
    except PackageNotFoundError:
        return False
