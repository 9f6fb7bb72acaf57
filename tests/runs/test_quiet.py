"""Quiet commands print their table and nothing else."""

import importlib
import sys
from threading import Thread

import pytest
from tqdm.auto import tqdm

from memloc_lens import load_sequences
from memloc_lens.console import COMMANDS
from memloc_lens.runs.quiet import without_bars

RECITED = "--model {recited}/model --data {recited}/data.jsonl --limit 1 --device cpu --methods random --out {out}/run"
BARS = {
    "del": (f"{RECITED} --negatives 1 --controls 1 --ratios 0.5", ["Loading weights", "DEL: 100%"]),
    "inj": (f"{RECITED} --ratios 0.2 --max-steps 2", ["Loading weights", "INJ: "]),
    "find": ("--corpus {out}/corpus.txt --out {out}/found", ["Loading weights", "teacher-forced: "]),
    "specificity": ("{whole}", ["Loading weights", "specificity: 100%"]),
    "roles": ("{whole}", ["Loading weights", "roles: 100%"]),
}
"""For each command its arguments, and the bars that it shows."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished DEL run of the embedded model."""
    path = tmp_path_factory.mktemp("quiet") / "del"
    small = "--limit 2 --negatives 1 --controls 1 --text-tokens 128 --methods random --ratios 0.01 --device cpu --out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["del", *small.split(), str(path)])
        importlib.import_module(COMMANDS["del"][0]).main()
    return path


@pytest.mark.parametrize("name", BARS)
def test_only_the_table_is_printed(name, recited, whole, embedded, tmp_path, monkeypatch, capsys):
    (tmp_path / "corpus.txt").write_text(load_sequences(embedded)[0].text(embedded))
    arguments, bars = BARS[name]
    words = arguments.format(recited=recited, whole=whole, out=tmp_path).split()
    main = importlib.import_module(COMMANDS[name][0]).main
    monkeypatch.setattr(sys, "argv", [name, *words])
    main()
    shown = capsys.readouterr()
    assert all(bar in shown.err for bar in bars)
    monkeypatch.setattr(sys, "argv", [name, *words, "--quiet"])  # in the same folder: it does not identify a run
    main()
    assert capsys.readouterr() == (shown.out, "")


def test_bars_come_back_when_the_last_quiet_run_has_ended():
    first, second = without_bars(), without_bars()
    with first:
        second.__enter__()
        assert tqdm([]).disable
    assert tqdm([]).disable
    second.__exit__(None, None, None)
    assert not tqdm([], leave=False).disable


def test_bars_of_other_threads_are_hidden():
    """As those of downloads in parallel."""
    disabled = []
    with without_bars():
        thread = Thread(target=lambda: disabled.append(tqdm([]).disable))
        thread.start()
        thread.join()
    assert disabled == [True]


def test_a_run_that_fails_leaves_bars_as_they_were():
    shown = tqdm.__init__
    with pytest.raises(ValueError, match="torn"), without_bars():
        raise ValueError("torn")
    assert tqdm.__init__ is shown
