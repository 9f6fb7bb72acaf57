"""Runs on workers of ray that are disturbed: the result is that of a run that nobody disturbed."""

from contextlib import ExitStack

import pytest

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray", "ignore:.*:ResourceWarning")


@pytest.fixture
def site(tmp_path):
    import faults

    with ExitStack() as stack:
        try:
            site = stack.enter_context(faults.made_site(tmp_path))
        except OSError as error:
            pytest.skip(str(error))
        yield site


MORE = [("inj", "node"), ("find", "KILL"), ("del", "TERM"), ("find", "replaced"), ("inj", "worker"), ("del", "disk")]


@pytest.mark.parametrize("pairs", [[("inj", "disk")], pytest.param(MORE, marks=pytest.mark.slow)], ids=["one", "more"])
def test_disturbed_runs_come_to_the_same_result(recited, site, pairs):
    import faults

    for fault in faults.faults(recited, site, pairs, seed=1):
        assert not fault.wrong, fault
