"""What a run finds does not depend on who does its jobs, where, and in which order."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import engines
import pytest

from conftest import keys_of, records_of
from memloc_lens.benchmarks import deletion, injection

KINDS = {"backwards": engines.backwards, "shuffled": engines.shuffled, "twice": engines.twice, "elsewhere": None}


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[engines.Elsewhere]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        yield engines.Elsewhere(process)


@pytest.fixture(params=KINDS)
def engine(request):
    return KINDS[request.param] or request.getfixturevalue("elsewhere")


@pytest.mark.parametrize("benchmark", [deletion, injection], ids=["del", "inj"])
def test_the_same_records_and_the_same_summary(request, tmp_path, benchmark, engine):
    whole = request.getfixturevalue("whole_del" if benchmark is deletion else "whole_inj")
    settings = replace(whole, out=tmp_path)
    benchmark.run(settings, engine)
    records, expected = records_of(tmp_path), records_of(whole.out)
    assert len(set(keys_of(records))) == len(records)
    assert sorted(records, key=str) == sorted(expected, key=str)
    assert (tmp_path / "summary.json").read_text() == (whole.out / "summary.json").read_text()
    if engine in (engines.backwards, engines.shuffled):
        assert records != expected  # in another order


def test_the_summary_of_inj_does_not_depend_on_which_ratio_was_first(whole_inj, tmp_path):
    settings = replace(whole_inj, methods=("activations",), ratios=(0.2, 0.1), limit=1)
    injection.run(replace(settings, out=tmp_path / "first"))
    injection.run(replace(settings, out=tmp_path / "last"), engines.backwards)
    ratios = [[record["ratio"] for record in records_of(tmp_path / name)] for name in ("first", "last")]
    assert ratios[0] == ratios[1][::-1] == [0.2, 0.2, 0.1, 0.1]
    summaries = [(tmp_path / name / "summary.json").read_text() for name in ("first", "last")]
    assert summaries[0] == summaries[1]
