"""The command line as a user meets it, in processes of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import keys_of, records_of
from memloc_lens.runs.schema import BEFORE

COMMAND = [sys.executable, "-m", "memloc_lens.benchmarks.del"]
METHODS = "activations random".split()
RATIOS = "0.05 0.1".split()
SMALL = [*"--limit 2 --negatives 4 --controls 2 --text-tokens 128 --device cpu --ratios".split(), *RATIOS,
         "--methods", *METHODS]  # fmt: skip
RECORDS = 2 * (1 + len(METHODS) * len(RATIOS))
"""Of each target the state before, and one for each method and ratio."""
OWN = """
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mine:
    strength: float = 1.0

    def __call__(self, model, sequences):
        norms = torch.stack([block.mlp.W_out.norm(dim=1) for block in model.blocks])
        return self.strength * norms.expand(len(sequences), *norms.shape)


def plain(model, sequences):
    return -Mine()(model, sequences)
"""


def command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def written(out: Path) -> int:
    """How many lines of records a run has written so far."""
    file = out / "records.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_methods_of_the_users_own(recited, tmp_path):
    (tmp_path / "mymod.py").write_text(OWN)
    small = (
        f"--model {recited / 'model'} --data {recited / 'data.jsonl'} --limit 2 --negatives 2 --controls 1 "
        "--ratios 0.5 --device cpu --out run --methods random weight-norm mymod:Mine"
    ).split()
    shown = command(*small, "mymod:plain", "--mine.strength", "3", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"│ mine +│", shown.stdout)
    assert re.search(r"│ plain +│", shown.stdout)
    records, methods = records_of(tmp_path / "run"), ("random", "weight-norm", "mine", "plain")
    wanted = [(t, m, r) for t in ("s0", "s1") for m, r in ((BEFORE, 0.0), *((method, 0.5) for method in methods))]
    assert sorted(keys_of(records)) == sorted(wanted)
    by_method = [
        [{**r, "method": "", "crc32": 0} for r in records if r["method"] == method]
        for method in ("mine", "weight-norm")
    ]
    assert by_method[0] == by_method[1]  # three times the scores are the same ranking
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["methods"]["mine"] == {"callable": "mymod:Mine", "strength": 3.0}
    assert config["methods"]["plain"] == {"callable": "mymod:plain"}

    other = command(*small, "--mine.strength", "4", cwd=tmp_path)
    assert other.returncode != 0
    assert "mine.strength is 3.0 there and 4.0 here" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["--ratios", "0.0001"], "takes none of 768 neurons"),
    (["--hard-concrete.lr", "nan"], "lr is nan; it must be a number above 0"),
])  # fmt: skip
@pytest.mark.slow
def test_bad_arguments_are_one_error(tmp_path, arguments, message):
    shown = command(*arguments, "--out", tmp_path / "run")
    assert shown.returncode != 0
    assert message in shown.stderr + shown.stdout
    assert "Traceback" not in shown.stderr
    assert not (tmp_path / "run").exists()
