import resource

import pytest
import torch

from memloc_lens import heap
from memloc_lens.heap import kept_memory

MEGABYTES = 2**26
needs_glibc = pytest.mark.skipif(heap._glibc() is None, reason="the heap of another C library stays as it is")


def faults_of_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(MEGABYTES // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@needs_glibc
def test_a_tensor_takes_the_memory_of_the_one_before():
    pages = MEGABYTES // resource.getpagesize()
    with kept_memory():
        faults_of_a_tensor()
        assert faults_of_a_tensor() < pages / 10
        with kept_memory():
            pass
        assert faults_of_a_tensor() < pages / 10  # the outer context is still open
    assert faults_of_a_tensor() >= pages / 2  # what was kept is given back


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with kept_memory():
        assert heap._open == []
