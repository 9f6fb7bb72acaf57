"""The command line as a user meets it, in processes of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "memloc_lens.benchmarks.del"]
SMALL = (
    "--limit 2 --negatives 4 --controls 2 --text-tokens 256 --ratios 0.05 0.1 --device cpu "
    "--methods slimming integrated-gradients activations random"
).split()
README = Path(__file__).parents[2] / "README.md"


def records_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_seconds")} for line in lines]


def test_kill_and_go_on(tmp_path):
    whole = subprocess.run(
        [*COMMAND, *SMALL, "--out", str(tmp_path / "whole")], check=True, capture_output=True, text=True
    )
    assert "Self-Acc" in whole.stdout
    assert len(records_of(tmp_path / "whole")) == 2 * 4 * 2

    out = tmp_path / "killed"
    running = subprocess.Popen(
        [*COMMAND, *SMALL, "--out", str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        while running.poll() is None and not (out / "records.jsonl").exists():
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGKILL)
    finally:
        running.wait()
    assert len((out / "records.jsonl").read_text().splitlines()) < 16
    subprocess.run([*COMMAND, *SMALL, "--out", str(out)], check=True, capture_output=True)
    assert records_of(out) == records_of(tmp_path / "whole")
    assert (out / "summary.json").read_text() == (tmp_path / "whole" / "summary.json").read_text()

    other = subprocess.run([*COMMAND, *SMALL, "--seed", "1", "--out", str(out)], capture_output=True, text=True)
    assert other.returncode != 0
    assert "error: " in other.stderr
    assert "seed is 0 there and 1 here" in other.stderr
    assert "Traceback" not in other.stderr


def test_help_explains_every_field():
    from dataclasses import fields

    from memloc_lens.benchmarks.deletion import Settings

    shown = subprocess.run([*COMMAND, "--help"], check=True, capture_output=True, text=True).stdout
    shown = re.sub(r"[\s│]+", " ", shown)  # lines break where the terminal, or what stands in for it, ends
    for entry in fields(Settings):
        assert "--" + entry.name.replace("_", "-") in shown
    assert "the paper leaves out layer 0" in shown
    assert "training ends when the mean absolute mask falls under it" in shown


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "/nowhere"], "no model at '/nowhere'"),
    (["--ratios", "0.0001"], "takes none of 768 neurons"),
    (["--methods", "guess"], "guess"),
])  # fmt: skip
def test_bad_arguments_are_one_error(tmp_path, arguments, message):
    shown = subprocess.run([*COMMAND, *arguments, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert shown.returncode != 0
    assert message in shown.stderr + shown.stdout
    assert "Traceback" not in shown.stderr


def test_python_of_the_readme_runs_as_printed(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, check=True, capture_output=True, text=True)
