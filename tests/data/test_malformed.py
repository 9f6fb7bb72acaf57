"""Malformed files of every format: each gives one line that names the file, the place in it, and the reason."""

import json
import re

import pytest
import torch
from conftest import VOCAB
from datasets import Dataset

from memloc_lens.data import files, load_definitions, load_sequences

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
        (lines('{"prompt": "x", "all": "Return the items", "prompt_len": 1}'), "line 1: the text 'all' does not start"),
        (lines(GOOD, "", '{"all": "Return the items", "prompt_len": 99}'), "line 3: .* prompt_len must be between"),
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
    assert_one_line(lambda: load_sequences(gpt2, tmp_path / "none.pt"), "none.pt", "cannot be read: No such file")


def test_memorized_evals(gpt2, monkeypatch):
    def refused(rows, message):
        monkeypatch.setattr(files, "load_dataset", lambda name, split, streaming: Dataset.from_list(rows))
        name = "EleutherAI/pythia-memorized-evals:duped.70m"
        assert_one_line(lambda: load_sequences(gpt2, name), name, message)

    refused([{"index": 3, "text": "a"}], "row 1: no column 'tokens', only index, text")
    refused(
        [{"index": 3, "tokens": [1] * 40}, {"index": 4, "tokens": [1] * 20}], "row 2: .* prompt_len must be between"
    )
    refused([{"index": 3, "tokens": [VOCAB] * 40}], "row 1: .* was it made with another tokenizer")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "A"}', "line 2: no field 'definition'"),
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
