import subprocess
import sys
from pathlib import Path

import pytest

from memloc_lens.runs import provenance as module
from memloc_lens.runs.provenance import provenance


@pytest.mark.parametrize(
    ("module_name", "arguments", "expected"),
    [
        ("memloc_lens.benchmarks.del", ["/x/del.py", "--limit", "2"], "python -m memloc_lens.benchmarks.del --limit 2"),
        ("memloc_lens.report.__main__", ["/x", "a b"], "python -m memloc_lens.report 'a b'"),
        (None, ["memloc del", "--quiet"], "memloc del --quiet"),
        ("pytest.__main__", ["pytest"], "from Python"),
        (None, ["/usr/bin/ipython", "-c", "secret"], "from Python"),
    ],
)
def test_the_command_is_that_of_the_package_only(monkeypatch, module_name, arguments, expected):
    spec = None if module_name is None else type("Spec", (), {"name": module_name})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", arguments)
    assert module._command() == expected


def test_the_commit_is_that_of_the_package(monkeypatch, tmp_path):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(module, "PACKAGE", package)
    assert module._commit() == ""  # not a checkout
    git("init")
    Path(package / "__init__.py").write_text("")
    assert module._commit() == ""  # a checkout of something else
    git("add", ".")
    git("commit", "-m", "first")
    commit = module._commit()
    assert len(commit) >= 7
    Path(package / "__init__.py").write_text("changed")
    assert module._commit() == commit + "+"
    monkeypatch.setenv("PATH", "")  # no git
    assert module._commit() == ""
    assert provenance()["machine"]
