import json

import pytest
from datasets import Dataset

from memloc_lens.data import load_definitions
from memloc_lens.data.definitions import DEFINITIONS


def test_own_definitions(embedded):
    test, dev = load_definitions(embedded), load_definitions(embedded, split="dev")
    assert (len(test), len(dev)) == (60, 5)
    texts = {sequence.text(embedded) for sequence in test + dev}
    assert len(texts) == 65
    assert all(sequence.prompt_len == 1 and 25 <= len(sequence.tokens) <= 50 for sequence in test + dev)
    assert next(iter(test)).text(embedded).endswith(".")


def test_files(embedded, tmp_path):
    (tmp_path / "ecbd.jsonl").write_text('{"definition": "A b\\u00a0c is a d."}\n\n{"text": "Second text."}\n')
    (tmp_path / "plain.txt").write_text("First line.\n\n  Second line.  \n")
    loaded = load_definitions(embedded, tmp_path / "ecbd.jsonl")
    assert [sequence.text(embedded) for sequence in loaded] == ["A b\u00a0c is a d.", "Second text."]
    assert [sequence.id for sequence in loaded] == ["ecbd-1", "ecbd-3"]
    plain = load_definitions(embedded, str(tmp_path / "plain.txt"), max_tokens=2)
    assert [len(sequence.tokens) for sequence in plain] == [2, 2]
    assert plain[1].id == "plain-3"


def test_a_data_set_on_the_hub(embedded, monkeypatch):
    def load(name: str, split: str, streaming: bool) -> Dataset:
        assert (name, split) == ("owner/texts", "test")
        return Dataset.from_list([{"text": "One thing."}, {"text": "Another thing."}])

    monkeypatch.setattr("datasets.load_dataset", load)
    loaded = load_definitions(embedded, "owner/texts")
    assert [(sequence.id, sequence.text(embedded)) for sequence in loaded] == [
        ("texts-1", "One thing."),
        ("texts-2", "Another thing."),
    ]

    def fail(name: str, split: str, streaming: bool) -> Dataset:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ValueError, match="'owner/texts' with its split 'test' could not be loaded: no network"):
        load_definitions(embedded, "owner/texts")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"definition": "x y"}\n{"sentence": "x"}',
            r"a\.jsonl, line 2: neither 'tokens' nor a text; .* the row has sentence",
        ),
        ("a.jsonl", '{"definition": "x y"}\n{"defin', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"definition": ""}', r"a\.jsonl, line 1: the text of sequence 'a-1' is empty"),
        ("a.txt", "A word\n\n" + "too long " * 100, r"a\.txt, line 3: .* reads at most 128"),
        ("a.jsonl", '{"text": "x y", "split": "dev"}', r"a\.jsonl has no split 'test'; it has dev"),
        ("a.jsonl", '{"text": "x y", "id": 7}\n{"text": "y", "id": "7"}', r"line 1 and .*line 2 share an id, '7'"),
        ("a.txt", "\n\n", r"a\.txt has no rows"),
    ],
)
def test_bad_files_are_refused_by_line(embedded, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_definitions(embedded, tmp_path / name)


@pytest.mark.parametrize("max_tokens", [-1, 1])
def test_a_cut_that_leaves_nothing_to_learn_is_refused(embedded, max_tokens):
    with pytest.raises(ValueError, match=rf"max_tokens is {max_tokens}; it must be 0 \(no cut\) or at least 2"):
        load_definitions(embedded, max_tokens=max_tokens)


def test_tokens_need_no_tokenizer(gpt2, embedded, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    assert load_definitions(gpt2, tmp_path / "a.jsonl")[0].tokens.tolist() == [1, 2, 3]
    (tmp_path / "a.jsonl").write_text('{"tokens": [1, 2, 3], "text": "Return the items"}\n')
    assert load_definitions(embedded, tmp_path / "a.jsonl")[0].text(embedded) == "Return the items"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .* no tokenizer to read texts with"):
        load_definitions(gpt2, tmp_path / "a.jsonl")


def test_what_is_neither_file_nor_data_set(embedded):
    with pytest.raises(ValueError, match="no texts at 'nowhere'"):
        load_definitions(embedded, "nowhere")
    assert json.loads(DEFINITIONS.read_text().splitlines()[0])["split"] == "dev"
