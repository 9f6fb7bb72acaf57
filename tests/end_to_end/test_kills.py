"""Runs that are killed, and two at once: the result is that of a run that nobody disturbed."""

import json
import re
import signal

import kills
import pytest


def test_killed_runs_resume_to_the_same_result(recited, tmp_path):
    for kill in kills.kills(recited, tmp_path, count=3, seed=1):
        assert kill.exact, kill
        if kill.signal == "TERM" and kill.records:
            assert kill.exitcode == 128 + signal.SIGTERM
            assert "stopped; what was recorded is kept: repeat the command to resume" in kill.said


@pytest.mark.parametrize("kind", ["del"])
def test_two_at_once(recited, tmp_path, kind):
    codes, said = kills.two_at_once(kind, recited, tmp_path / "both")
    assert sorted(codes) == [0, 1]
    (error,) = [line for line in said[codes.index(1)].splitlines() if line.startswith("error: ")]
    holder = json.loads((tmp_path / "both" / "lock.json").read_text())
    assert re.search(rf"both is in use by process {holder['process']} on {holder['host']}; wait for it", error)
    kills.finish(kind, recited, tmp_path / "alone")
    assert kills.result(kind, tmp_path / "both") == kills.result(kind, tmp_path / "alone")
