import resource
import subprocess
import sys

import pytest

from memloc_lens import heap
from memloc_lens.heap import kept_memory

MEGABYTES = 2**26
needs_glibc = pytest.mark.skipif(heap._glibc() is None, reason="the heap of another C library stays as it is")


FAULTS = f"""
import resource, torch
from memloc_lens.heap import kept_memory

def faults_of_tensors():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros({MEGABYTES} // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with kept_memory():
    outer = faults_of_tensors()
    with kept_memory():
        pass
    still_open = faults_of_tensors()
print(outer, still_open, faults_of_tensors())
"""
"""Run by itself: where a tensor goes depends on all that a process has ever allocated."""


@needs_glibc
def test_tensors_take_the_memory_of_those_before():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    outer, still_open, after = map(int, done.stdout.split())
    pages = MEGABYTES // resource.getpagesize()
    assert outer < 3 * pages  # of ten tensors: a hole may be a few bytes too small for the second
    assert still_open < 3 * pages  # the inner context does not end the outer one
    assert after >= pages  # what was kept is given back


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with kept_memory():
        assert heap._open == []
