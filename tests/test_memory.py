from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_sequence
from memloc_lens import HardConcrete, IntegratedGradients, Slimming, ZeroOut, memory, memory_budget
from memloc_lens.memory import in_chunks, parse_memory, rows_at_once


@pytest.mark.parametrize(
    ("text", "expected"), [("8GiB", 8 * 2**30), ("1.5 GiB", 3 * 2**29), (" 500 MB ", 5 * 10**8), ("12B", 12)]
)
def test_amounts_of_memory(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "8", "GiB", "8 gib", "1.2.3MB", "-1GB"])
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match="write an amount with one of the units B, KiB, MiB, GiB"):
        parse_memory(text)


def test_a_budget_below_what_is_taken_is_refused():
    with pytest.raises(ValueError, match="GiB are taken by the model and Python already"), memory_budget("1MiB"):
        pass


def test_a_smaller_budget_means_fewer_rows(gpt2, monkeypatch):
    monkeypatch.setattr(memory, "_taken", lambda device: 2**30)
    rows = []
    for limit in ("1025MiB", "1030MiB", "64GiB"):
        with memory_budget(limit):
            rows.append(rows_at_once(gpt2, 40, 20, graph_layers=3))
    assert rows[0] < rows[1] < rows[2] == 2560 // 40
    assert rows_at_once(gpt2, 40, 20) == 2560 // 40
    with memory_budget("1073741825 B"):
        assert rows_at_once(gpt2, 40, 20) == 1


def test_a_row_that_trains_more_takes_more(gpt2, monkeypatch):
    """The mask of every row with its gradient and the moments of Adam: 32 bytes an entry."""
    monkeypatch.setattr(memory, "_taken", lambda device: 2**30)
    with memory_budget(f"{2**30 + 2**28}B"):
        rows = [rows_at_once(gpt2, 40, 20, graph_layers=3, parameters=count) for count in (0, 10**5, 10**6, 10**7)]
    assert rows[0] == 2560 // 40 > rows[1] > rows[2] > rows[3] == 1
    assert rows[2] <= 2**28 // (32 * 10**6)


def test_a_budget_is_in_force_in_every_thread(gpt2, monkeypatch):
    monkeypatch.setattr(memory, "_taken", lambda device: 2**30)
    with ThreadPoolExecutor(1) as pool:
        in_thread = lambda: pool.submit(rows_at_once, gpt2, 40, 20).result()  # noqa: E731
        assert in_thread() == 2560 // 40
        with memory_budget(f"{2**30 + 1}B"):
            assert in_thread() == 1
            with memory_budget("64GiB"):
                assert in_thread() == 2560 // 40
            assert in_thread() == 1
        assert in_thread() == 2560 // 40


@given(st.integers(0, 30), st.integers(1, 12), st.integers(1, 9))
def test_chunks_are_halved_until_they_fit(count, size, fits):
    seen = []

    def work(some: torch.Tensor) -> torch.Tensor:
        if len(some) > fits:
            raise torch.OutOfMemoryError
        seen.append(len(some))
        return some * 2

    results = in_chunks(torch.arange(count), size, work)
    assert [value for result in results for value in result.tolist()] == list(range(0, 2 * count, 2))
    assert all(length <= fits for length in seen)


def test_what_never_fits_is_told():
    def work(some: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        in_chunks(torch.arange(5), 4, work)


@pytest.mark.parametrize(
    "localizer",
    [
        ZeroOut(),
        IntegratedGradients(steps=4),
        Slimming(steps=6, lr=0.02, stop_loss=0),
        HardConcrete(steps=6, stop_loss=0),
        ZeroOut(component="head"),
        Slimming(steps=6, lr=0.02, stop_loss=0, component="weight"),
        HardConcrete(steps=6, stop_loss=0, component="head"),
    ],
    ids=lambda localizer: f"{localizer.name}-{getattr(localizer, 'component', 'neuron')}",
)
def test_scores_do_not_depend_on_the_budget(gpt2, localizer, monkeypatch):
    sequences = [random_sequence(seed, length=11) for seed in range(2)]
    at_once = localizer(gpt2, sequences)
    monkeypatch.setattr(memory, "_free", lambda device: 1)
    assert rows_at_once(gpt2, 11, 5) == 1
    assert torch.allclose(localizer(gpt2, sequences), at_once, atol=1e-6)
