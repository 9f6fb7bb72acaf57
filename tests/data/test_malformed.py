"""Malformed files of every format: each gives one line that names the file, the line or row, and the reason."""

import gzip
import json
import re

import numpy as np
import pytest
import torch
from bad_files import BAD
from datasets import Dataset

from conftest import VOCAB
from memloc_lens.data import load_definitions, load_sequences, opening, readers, token_formats
from memloc_lens.data.corpus import read_corpus

TEXT = "Return the number of items in the list, or raise an error if there are none."
GOOD = json.dumps({"prompt": TEXT[:10], "all": TEXT, "prompt_len": 2, "category": ["docs"]})


class Payload:
    """What a pickle could run, were it read as one."""

    def __reduce__(self):
        return (print, ("this must not run",))


def lines(*rows: str) -> bytes:
    return "\n".join(rows).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(GOOD, GOOD[:-9]), "line 2: not JSON"),
        (lines(GOOD, f"[{GOOD}]"), "line 2: a list where an object"),
        (lines(GOOD, '{"all": "Return the items"}'), "line 2: prompt_len is None"),
        (
            lines('{"prompt": "x", "all": "Return the items", "prompt_len": 1}'),
            "line 1: the text does not start with 'prompt'",
        ),
        (lines(GOOD, "", '{"all": "Return the items", "prompt_len": 99}'), "line 3: .* prompt_len must be between"),
        (lines(GOOD, '{"all": "Return", "prompt_len": ' + "9" * 5000 + "}"), "line 2: JSON that cannot be read"),
        (lines(GOOD).replace(b"Return", b"\xff\xfe"), "is not a text file in UTF-8"),
    ],
)
def test_gpt2_xl_lines(embedded, tmp_path, content, message):
    path = tmp_path / "gpt2-xl.jsonl"
    path.write_bytes(content)
    assert_one_line(lambda: load_sequences(embedded, path), "gpt2-xl.jsonl", message)


def test_pythia_tensors(gpt2, tmp_path, capsys):
    def refused(value, message, cut=None):
        path = tmp_path / "pythia.pt"
        torch.save(value, path)
        path.write_bytes(path.read_bytes()[:cut])
        assert_one_line(lambda: load_sequences(gpt2, path), "pythia.pt", message)

    rows = torch.randint(VOCAB, (7, 40))
    refused(Payload(), "not a tensor that torch.save wrote")
    refused(rows, "not a tensor that torch.save wrote", cut=700)
    refused(rows.float(), r"a tensor torch.float32 \[7, 40\]; a tensor of whole numbers \[row, pos\] was expected")
    refused(rows[0], r"a tensor torch.int64 \[40\]")
    refused({"tokens": rows}, "holds dict")
    refused(rows[:, :32], "row 1: .* prompt_len 32 and 32 tokens")
    refused(torch.where(torch.arange(7)[:, None] == 3, VOCAB, rows), f"row 4: .* the model knows 0 to {VOCAB - 1}")
    assert "this must not run" not in capsys.readouterr().out
    assert_one_line(lambda: load_sequences(gpt2, tmp_path / "none.pt"), "none.pt", "no sequences at")


def test_token_arrays(gpt2, tmp_path):
    def refused(message, name="a.npy", **arrays):
        for stem, array in arrays.items():
            np.save(tmp_path / f"{stem}.npy", array)
        assert_one_line(lambda: load_sequences(gpt2, tmp_path / name), "a", message)

    rows = np.ones((3, 40), dtype=np.int64)
    refused(r"a\.npy holds a tensor torch.float32 \[3, 40\]", a=rows.astype(np.float32))
    refused(r"a\.npy holds a tensor torch.bool", a=rows > 0)
    refused(r"a\.npy is not an array of numbers that numpy.save wrote", a=rows.astype(str))
    (tmp_path / "a.npy").write_bytes(b"none")
    refused(r"a\.npy is not an array of numbers that numpy.save wrote")
    refused(r"a_suffix\.npy cannot be read: No such file", "a_prefix.npy", a_prefix=rows)
    refused("a_prefix.npy has 3 rows and .*a_suffix.npy has 2", "a_prefix.npy", a_suffix=rows[:2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"1" + b",2" * 40 + b"\n\n1,x\n", "line 3: '1,x' is not a line of token ids"),
        ("a.csv", b"1,2.5\n", "line 1: '1,2.5' is not a line of token ids"),
        ("a.json", b'[{"all": "x y",\n "prompt_len" 1}]', "line 2: not JSON"),
        ("a.json", b"[3]", "row 1: a int where an object"),
        ("a.jsonl.gz", b"none", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "a.jsonl.gz cannot be read: Compressed file ended"),
    ],
)
def test_other_formats(embedded, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert_one_line(lambda: load_sequences(embedded, tmp_path / name), name, message)
    assert_one_line(lambda: list(read_corpus([tmp_path / name])), name, r"a\.(csv|json)|is not a text file in UTF-8: ")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", BAD)
def test_whoever_reads_a_bad_file_refuses_it(embedded, tmp_path, name):
    file, write, message = BAD[name]
    write(tmp_path / file)
    is_plain = readers.reader_of(tmp_path / file) is readers.plain_text
    loaders = (
        () if is_plain else (lambda: load_sequences(embedded, tmp_path / file),),
        () if is_plain else (lambda: load_definitions(embedded, tmp_path / file),),
        () if name.startswith("an empty .") else (lambda: list(read_corpus([tmp_path / file])),),
    )
    for (load,) in filter(None, loaders):
        assert_one_line(load, "a", message)


def test_what_is_held_in_memory_is_bounded(gpt2, tmp_path, monkeypatch):
    """A small compressed file can unpack to any size, and a line can be as long as a file."""
    monkeypatch.setattr(opening, "LARGEST", 2**20)
    monkeypatch.setattr(token_formats, "LARGEST", 2**20)
    for name in ("a.jsonl.gz", "a.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"1" * 2**21))
        assert_one_line(lambda name=name: load_sequences(gpt2, tmp_path / name), name, "line 1 is longer than 1 MiB")
    (tmp_path / "a.txt").write_text("one two " * 2**18)
    assert_one_line(lambda: list(read_corpus([tmp_path / "a.txt"])), "a.txt", "more than 1 MiB of text")
    np.savez_compressed(tmp_path / "a.npz", tokens=np.zeros((2**10, 2**8), dtype=np.int64))
    assert_one_line(lambda: load_sequences(gpt2, tmp_path / "a.npz"), "a.npz", "more than 1 MiB of token ids")


def test_a_path_that_is_none(embedded, tmp_path):
    for source in ("", "a\0b"):
        for load in (load_sequences, load_definitions):
            with pytest.raises(ValueError, match="the source is"):
                load(embedded, source)
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        load_definitions(embedded, "x" * 300)


def test_memorized_evals(gpt2, monkeypatch):
    def refused(rows, message):
        monkeypatch.setattr("datasets.load_dataset", lambda name, split, streaming: Dataset.from_list(rows))
        name = "EleutherAI/pythia-memorized-evals:duped.70m"
        assert_one_line(lambda: load_sequences(gpt2, name), name, message)

    refused([{"index": 3, "text": "a"}], "row 1: prompt_len is None")
    refused(
        [{"index": 3, "tokens": [1] * 40}, {"index": 4, "tokens": [1] * 20}], "row 2: .* prompt_len must be between"
    )
    refused([{"index": 3, "tokens": [VOCAB] * 40}], "row 1: .* was it made with another tokenizer")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "A"}', "line 2: neither 'tokens' nor a text; .* the row has title"),
        ('{"definition": ""}', "line 2: the text .* is empty"),
        ('{"definition": "A thing', "line 2: not JSON"),
    ],
)
def test_ecbd(embedded, tmp_path, line, message):
    path = tmp_path / "ecbd_2021.jsonl"
    path.write_bytes(lines('{"definition": "A thing is a thing."}', line))
    assert_one_line(lambda: load_definitions(embedded, path), "ecbd_2021.jsonl", message)


def assert_one_line(load, file: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(file)) as error:
        load()
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
