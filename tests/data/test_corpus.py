import gzip

import pytest
import torch
from datasets import Dataset

from memloc_lens.data.corpus import Document, read_corpus, windows_of


def documents(*sources, **options):
    return [(document.content, document.category) for document in read_corpus(sources, **options)]


def test_folders_are_read_in_order_with_categories(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "deep").mkdir()
    (tmp_path / "LICENSE").write_text("one")
    (tmp_path / "b" / "deep" / "LICENSE.txt").write_text("two")
    (tmp_path / "b" / "code.py").write_text("three")
    (tmp_path / "b" / "LICENSE.png").write_bytes(b"\x89\xff")
    assert documents(tmp_path, names=["LICENSE*"]) == [("one", ()), ("two", ("b",))]
    assert documents(tmp_path) == [("one", ()), ("three", ("b",)), ("two", ("b",))]


def test_lines_tensors_and_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "category": ["x"]}\n{"tokens": [1, 2]}\n')
    (tmp_path / "b.txt").write_text("three")
    torch.save(torch.tensor([[3, 4], [5, 6]], dtype=torch.int32), tmp_path / "c.pt")
    assert documents(*(tmp_path / name for name in ("a.jsonl", "b.txt", "c.pt"))) == [
        ("one", ("x",)),
        ([1, 2], ()),
        ("three", ()),
        ([3, 4], ()),
        ([5, 6], ()),
    ]


def test_a_data_set_on_the_hub_is_streamed(monkeypatch):
    def load(name, split, streaming):
        assert (name, streaming) == ("owner/name", True)
        return Dataset.from_list([{"text": split}]).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    assert documents("owner/name", "owner/name:held.out") == [("train", ()), ("held.out", ())]


def test_windows(gpt2, embedded, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": [0, 1, 2, 3, 4, 5, 6, 7]}\n{"tokens": [1, 2]}\n')
    windows = list(windows_of(gpt2, read_corpus([tmp_path / "a.jsonl"]), length=4, stride=2))
    assert [window.tokens for window in windows] == [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7)]
    assert [window.start for window in windows] == [0, 2, 4]
    (tmp_path / "a.txt").write_text("Return the number of items")
    (window,) = windows_of(embedded, read_corpus([tmp_path / "a.txt"]), length=4, stride=4)
    assert embedded.tokenizer.decode(window.tokens) == "Return the number of"
    with pytest.raises(ValueError, match=r"no tokenizer to read .*a\.txt with"):
        list(windows_of(gpt2, read_corpus([tmp_path / "a.txt"]), length=4, stride=4))


def test_what_is_no_corpus(tmp_path):
    with pytest.raises(ValueError, match="no corpus at"):
        documents(tmp_path / "none")
    (tmp_path / "a.jsonl").write_text('{"txt": "one"}\n')
    for source in (tmp_path / "a.jsonl", tmp_path):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: neither 'tokens' nor a text; .* the row has txt"):
            documents(source)
    with pytest.raises(ValueError, match="to leave the file out, choose files with names"):
        documents(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"tokens": ["a"]}', "'a' is no token id"),
        ('{"tokens": [1.5, 2]}', "1.5 is no token id"),
        ('{"tokens": [1, -100]}', "-100 is no token id"),
        ('{"tokens": [1, true]}', "True is no token id"),
        ('{"tokens": [[1, 2]]}', r"\[1, 2\] is no token id"),
        ('{"tokens": null}', "neither 'tokens' nor a text; .* the row has no field"),
        ('{"tokens": 5}', "tokens is 5; it must be a list"),
        ('{"text": "one", "category": [1]}', r"category is \[1\]; it must be a list of strings"),
        ('{"text": "half \\ud83d of it"}', ".* half of a character, at character 5"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 1: {message}"):
        documents(tmp_path / "a.jsonl")


def test_a_category_may_be_one_string(tmp_path):
    """Not its letters, which most words share."""
    (tmp_path / "a.jsonl").write_text('{"text": "one", "category": "licences"}')
    assert documents(tmp_path / "a.jsonl") == [("one", ("licences",))]


def test_a_category_of_a_document_is_one_subject(gpt2):
    (window,) = windows_of(gpt2, [Document([1, 2], "here", "licences")], length=2, stride=2)
    assert window.category == ("licences",)


def test_a_file_of_a_folder_that_is_damaged_is_not_skipped(tmp_path):
    """A picture is no text; a text that cannot be unpacked is one that would be missed."""
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"name\0\0\0text"))
    (tmp_path / "b.txt").write_text("one")
    assert documents(tmp_path) == [("one", ())]
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"two" * 99)[:-9])
    with pytest.raises(ValueError, match=r"c\.txt\.gz cannot be read: .*; to leave the file out"):
        documents(tmp_path)
