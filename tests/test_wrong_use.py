"""What users get wrong is one error of one line that says so: see `wrong_use.py`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from wrong_use import CASES


@pytest.fixture(scope="module")
def raised() -> dict[str, list[str]]:
    """The type and the message of what each case raises."""
    program = Path(__file__).with_name("wrong_use.py")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", program], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_wrong_use_is_one_clear_error(raised, case):
    kind, message = raised[case]
    assert kind == "ValueError", message
    assert re.search(CASES[case][0], message), message
    assert message.isprintable()
    assert len(message) < 300
