import json

import pytest

from memloc_lens.data import load_sequences, load_texts
from memloc_lens.metrics import free_running, suffix_accuracy, teacher_forced, text_distance

TEXT = "Return the number of items in the list, or raise an error if there are none."


def write(path, *lines: str):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_published_format(embedded, tmp_path):
    row = {"prompt": TEXT[:10], "all": TEXT, "prompt_len": 2, "category": ["docs", "lists"]}
    (sequence,) = load_sequences(embedded, write(tmp_path / "data.jsonl", json.dumps(row), ""))
    assert sequence.text(embedded) == TEXT
    assert (sequence.prompt_len, sequence.id, sequence.category) == (2, "data-1", ("docs", "lists"))


def test_tokens_need_no_tokenizer(gpt2, tmp_path):
    row = {"tokens": [1, 2, 3], "prompt_len": 1, "id": "a"}
    (sequence,) = load_sequences(gpt2, write(tmp_path / "data.jsonl", json.dumps(row)))
    assert sequence.tokens.tolist() == [1, 2, 3]


def test_splits(gpt2, tmp_path):
    rows = [json.dumps({"tokens": [1, 2], "prompt_len": 1, "id": name, "split": name}) for name in ("dev", "control")]
    path = write(tmp_path / "data.jsonl", *rows)
    assert [sequence.id for sequence in load_sequences(gpt2, path, split="control")] == ["control"]
    assert load_sequences(gpt2, path) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "a list where an object"),
        ('{"all": "Return the items"}', "prompt_len is None"),
        ('{"all": "Return the items", "prompt_len": "2"}', "prompt_len is '2'"),
        ('{"all": "Return the items", "prompt_len": 99}', "prompt_len must be between"),
        ('{"all": "", "prompt_len": 1}', "is empty"),
        ('{"all": "Return the items", "prompt_len": 1, "category": 3}', "category is 3; it must be a list of strings"),
        ('{"prompt_len": 1}', "neither a text 'all' nor 'tokens'"),
        ('{"prompt": "Raise", "all": "Return the items", "prompt_len": 1}', "does not start with 'prompt'"),
        ('{"tokens": [1, 5000], "prompt_len": 1}', "the model knows 0 to 4095"),
        ('{"tokens": ["a", "b"], "prompt_len": 1}', "tokens"),
        (json.dumps({"tokens": [1] * 129, "prompt_len": 1}), "reads at most 128"),
    ],
)
def test_a_bad_line_is_named(embedded, tmp_path, line, reason):
    path = write(tmp_path / "data.jsonl", json.dumps({"all": TEXT, "prompt_len": 2}), line)
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: ") as error:
        load_sequences(embedded, path)
    assert reason in str(error.value) or (reason == "tokens" and "str" in str(error.value))


def test_files_that_cannot_be_read(embedded, gpt2, tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_sequences(embedded, tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file in UTF-8"):
        load_sequences(embedded, tmp_path / "binary.jsonl")
    with pytest.raises(ValueError, match="only the embedded model has sequences of its own"):
        load_sequences(gpt2)


def test_texts(tmp_path):
    assert load_texts(write(tmp_path / "a.txt", "one", "two")) == ["one\ntwo\n"]
    assert load_texts(write(tmp_path / "a.jsonl", '{"text": "one"}', '{"text": "two"}')) == ["one", "two"]
    with pytest.raises(ValueError, match=r"line 1: no field 'text'"):
        load_texts(write(tmp_path / "b.jsonl", '{"txt": "one"}'))


def test_the_embedded_sequences_are_what_their_file_says(embedded):
    """A second look at the ground truth: the definition of memorized, measured here on some of each split."""
    dev, control = load_sequences(embedded, split="dev"), load_sequences(embedded, split="control")[:12]
    assert len(dev) == 5
    for sequences, memorized in ((dev + load_sequences(embedded)[:12], True), (control, False)):
        forced = suffix_accuracy(teacher_forced(embedded, sequences), sequences)
        greedy = text_distance(embedded, free_running(embedded, sequences), sequences)
        assert ((forced > 90) & (greedy <= 20)).tolist() == [memorized] * len(sequences)
        assert all(len(sequence.suffix.unique()) >= 16 for sequence in sequences)
        assert all((len(sequence.tokens), sequence.prompt_len) == (80, 32) for sequence in sequences)


def test_the_embedded_sequences_are_distinct(embedded):
    """No two share more than 5% of their 5-grams."""
    sequences = [s for split in ("dev", "test", "control") for s in load_sequences(embedded, split=split)]
    grams = [{tuple(s.tokens[i : i + 5].tolist()) for i in range(76)} for s in sequences]
    for place, one in enumerate(grams):
        for other in grams[:place]:
            assert len(one & other) / len(one | other) <= 0.05
