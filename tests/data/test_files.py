import csv
import gzip
import io
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from pyarrow import feather
from pyarrow import parquet as pq

from conftest import VOCAB, write_lines
from memloc_lens import MemorizedSequence
from memloc_lens.benchmarks.deletion import load_material
from memloc_lens.data import load_definitions, load_sequences, load_texts, readers
from memloc_lens.data.corpus import read_corpus
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
    assert load_sequences(gpt2, path, split="partial") == load_sequences(gpt2, path, split="guessable") == []


def test_a_split_that_is_missing_is_refused(embedded, gpt2, tmp_path):
    rows = [json.dumps({"tokens": [1, 2], "prompt_len": 1, "split": name}) for name in ("train", "dev")]
    path = write(tmp_path / "data.jsonl", *rows)
    for split in ("test", "tset"):
        with pytest.raises(ValueError, match=rf"data\.jsonl has no split '{split}'; it has dev, train"):
            load_sequences(gpt2, path, split)
    with pytest.raises(ValueError, match="has no split 'tset'; it has control, dev, partial, test"):
        load_sequences(embedded, split="tset")
    torch.save(torch.ones((4, 40), dtype=torch.long), tmp_path / "data.pt")
    with pytest.raises(ValueError, match=r"data\.pt has no split 'test'; it has dev"):
        load_sequences(gpt2, tmp_path / "data.pt")
    for split in ("test", "control"):
        with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
            load_sequences(gpt2, write(tmp_path / "empty.jsonl", ""), split)


def test_ids_must_differ(gpt2, tmp_path):
    rows = [json.dumps({"tokens": [1, 2], "prompt_len": 1, "id": "same", "split": name}) for name in ("dev", "test")]
    path = write(tmp_path / "data.jsonl", *rows)
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1 and .*data\.jsonl, line 2 share an id, 'same'"):
        load_sequences(gpt2, path)


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
        ('{"prompt_len": 1}', "neither 'tokens' nor a text; give a string as all,"),
        ('{"prompt": "Raise", "all": "Return the items", "prompt_len": 1}', "does not start with 'prompt'"),
        ('{"tokens": [1, 5000], "prompt_len": 1}', "the model knows 0 to 4095"),
        ('{"prompt": 5, "all": "Return the items", "prompt_len": 1}', "prompt is 5; it must be a string"),
        ('{"prompt": "Return the", "all": "Return the items", "prompt_len": 1}', "'prompt' has 2 of this model's"),
        ('{"tokens": ["a", "b"], "prompt_len": 1}', "'a' is no token id"),
        ('{"tokens": [1.5, 2], "prompt_len": 1}', "1.5 is no token id"),
        ('{"tokens": [1, true], "prompt_len": 1}', "True is no token id"),
        ('{"tokens": [], "prompt_len": 1}', "a sequence is one row of at least 2"),
        (json.dumps({"tokens": [10**30, 1], "prompt_len": 1}), "verflow"),
        (json.dumps({"tokens": [1] * 129, "prompt_len": 1}), "reads at most 128"),
    ],
)
def test_a_bad_line_is_named(embedded, tmp_path, line, reason):
    path = write(tmp_path / "data.jsonl", json.dumps({"all": TEXT, "prompt_len": 2}), line)
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: ") as error:
        load_sequences(embedded, path)
    assert reason in str(error.value)


def test_files_that_cannot_be_read(embedded, gpt2, tmp_path):
    with pytest.raises(ValueError, match=r"no sequences at '.*none\.jsonl': give a file \(\.csv, \.json, "):
        load_sequences(embedded, tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"a\.txt is plain text, which has no prompt_len"):
        load_sequences(embedded, write(tmp_path / "a.txt", TEXT))
    with pytest.raises(ValueError, match="a folder with 0 pairs"):
        load_sequences(embedded, tmp_path)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file in UTF-8"):
        load_sequences(embedded, tmp_path / "binary.jsonl")
    with pytest.raises(ValueError, match="only the embedded model has sequences of its own"):
        load_sequences(gpt2)


def test_texts(tmp_path):
    assert load_texts(write(tmp_path / "a.txt", "one", "two")) == ["one\ntwo\n"]
    assert load_texts(write(tmp_path / "a.jsonl", '{"text": "one"}', '{"text": "two"}')) == ["one", "two"]
    with pytest.raises(ValueError, match=r"line 1: no text; give a string as all, .* the row has txt"):
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


@pytest.mark.slow
def test_the_embedded_sequences_are_distinct(embedded):
    """No two share more than 5% of their 5-grams."""
    sequences = [s for split in ("dev", "test", "control") for s in load_sequences(embedded, split=split)]
    grams = [{tuple(s.tokens[i : i + 5].tolist()) for i in range(76)} for s in sequences]
    for index, one in enumerate(grams):
        for other in grams[:index]:
            assert len(one & other) / len(one | other) <= 0.05


ROWS = [{"all": TEXT, "prompt_len": 2, "id": "a"}, {"all": 'Raise\u2028an\n"error".', "prompt_len": 1, "id": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = pa.Table.from_pylist([{**row, "split": "test", "other": 0.5} for row in ROWS])


def separated(delimiter: str) -> str:
    content = io.StringIO()
    writer = csv.DictWriter(content, ["id", "all", "prompt_len", "split"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return content.getvalue()


def write_stream(path):
    with pa.ipc.new_stream(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE)


FORMATS = {
    "a.jsonl": LINES,
    "windows.jsonl": LINES.replace("\n", "\r\n").encode("utf-8-sig"),
    "A.JSONL": LINES,
    "a.ndjson": LINES,
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "two-parts.jsonl.gz": gzip.compress(LINES[:50].encode()) + gzip.compress(LINES[50:].encode()),
    "a.jsonl.zst": pa.compress(LINES.encode(), "zstd", asbytes=True),
    "lines.json": LINES,
    "list.json": json.dumps(ROWS, indent=1),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv": separated(","),
    "excel.csv": separated(",").encode("utf-8-sig"),
    "a.csv.gz": gzip.compress(separated(",").encode()),
    "a.tsv": separated("\t"),
    "a.parquet": lambda path: pq.write_table(TABLE, path, row_group_size=1),
    "a.feather": lambda path: feather.write_feather(TABLE, str(path)),
    "a.arrow": write_stream,
    "saved": lambda path: Dataset(TABLE).save_to_disk(path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_texts_means_the_same_to_every_reader(embedded, tmp_path, name):
    path, content = tmp_path / name, FORMATS[name]
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert_same_texts(embedded, path)


def test_a_data_set_on_the_hub_means_the_same_to_every_reader(embedded, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda name, split, streaming: Dataset.from_list(ROWS))
    assert_same_texts(embedded, "owner/name:test")


def assert_same_texts(model, source) -> None:
    texts = [row["all"] for row in ROWS]
    sequences, definitions = load_sequences(model, source), load_definitions(model, source)
    assert [sequence.text(model) for sequence in sequences] == texts
    assert [sequence.text(model) for sequence in definitions] == texts
    assert [sequence.id for sequence in sequences] == [sequence.id for sequence in definitions] == ["a", "b"]
    assert load_texts(source) == texts
    assert [document.content for document in read_corpus([source])] == texts


TOKENS = np.arange(6 * 40).reshape(6, 40) % VOCAB


def save_tokens(folder, name: str) -> None:
    path, halves = folder / name, (TOKENS[:, :10].astype(np.uint16), TOKENS[:, 10:].astype(np.uint16))
    if name in ("a.pt", "old.pt"):
        torch.save(torch.tensor(TOKENS), path, _use_new_zipfile_serialization=name == "a.pt")
    elif name in ("a.csv", "a.tsv"):
        np.savetxt(path, TOKENS, fmt="%d", delimiter="," if name == "a.csv" else "\t")
    elif name == "named.csv":
        path.write_text("tokens\n" + "".join(f'"{row}"\n' for row in TOKENS.tolist()))
    elif name == "a.parquet":
        pq.write_table(pa.table({"tokens": TOKENS.tolist(), "index": range(6)}), path)
    elif name == "a.jsonl":
        write_lines(path, [{"tokens": row} for row in TOKENS.tolist()])
    elif name == "a.npy":
        np.save(path, np.asfortranarray(TOKENS.astype(np.uint16)))
    elif name == "a.npz":
        np.savez_compressed(path, tokens=TOKENS.astype(np.uint32))
    elif name == "pair.npz":
        np.savez(path, prefix=halves[0], suffix=halves[1])
    else:
        np.save(folder / "a_prefix.npy", halves[0])
        np.save(folder / "a_suffix.npy", halves[1])


@pytest.mark.parametrize(
    ("name", "prompt_len", "dev"),
    [
        ("a.pt", 32, 5),
        ("old.pt", 32, 5),
        ("a.csv", 32, 0),
        ("a.tsv", 32, 0),
        ("named.csv", 32, 0),
        ("a.jsonl", 32, 0),
        ("a.parquet", 32, 0),
        ("a.npy", 32, 0),
        ("a.npz", 32, 0),
        ("pair.npz", 10, 0),
        ("a_prefix.npy", 10, 0),
        ("a_suffix.npy", 10, 0),
        ("", 10, 0),
    ],
)
def test_a_file_of_tokens_means_the_same_to_every_reader(gpt2, tmp_path, name, prompt_len, dev):
    save_tokens(tmp_path, name)
    path = tmp_path / name
    for load in (load_sequences, load_definitions):
        assert [sequence.tokens.tolist() for sequence in load(gpt2, path)] == TOKENS[dev:].tolist()
    assert load_sequences(gpt2, path)[0].prompt_len == prompt_len
    assert len(load_sequences(gpt2, path, split="dev")) == dev
    assert [document.content for document in read_corpus([path])] == TOKENS.tolist()
    assert [document.content for document in read_corpus([tmp_path])] == TOKENS.tolist()
    with pytest.raises(ValueError, match=r"(row|line) \d: no text"):
        load_texts(path)
    if prompt_len == 32:
        assert {sequence.prompt_len for sequence in load_sequences(gpt2, path, prompt_len=7)} == {7}
    else:
        assert load_sequences(gpt2, path, prompt_len=10)[0].prompt_len == 10
        with pytest.raises(ValueError, match="row 1: prompt_len is 10, and 7 was asked for"):
            load_sequences(gpt2, path, prompt_len=7)


def test_texts_take_a_prompt_len_that_they_do_not_have(embedded, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"all": TEXT}, {"all": TEXT, "prompt_len": 3}])
    with pytest.raises(ValueError, match=r"line 1: prompt_len is None; .* --prompt-len"):
        load_sequences(embedded, path)
    assert [sequence.prompt_len for sequence in load_sequences(embedded, path, prompt_len=3)] == [3, 3]
    with pytest.raises(ValueError, match="line 2: prompt_len is 3, and 4 was asked for; leave --prompt-len out"):
        load_sequences(embedded, path, prompt_len=4)
    for value in (0, -1, True):
        with pytest.raises(ValueError, match=f"prompt_len is {value}; it must be a whole number at least 1"):
            load_sequences(embedded, path, prompt_len=value)


def test_del_takes_a_prompt_len_for_data_without_one(small_del, tmp_path):
    save_tokens(tmp_path, "a.npy")
    settings = replace(small_del, data=tmp_path / "a.npy", prompt_len=7)
    assert {sequence.prompt_len for sequence in load_material(settings).targets} == {7}
    with pytest.raises(ValueError, match="prompt_len is 0; it must be a whole number at least 1"):
        replace(small_del, prompt_len=0)


def test_a_prompt_that_disagrees_with_the_tokens_is_refused(embedded, tmp_path):
    """The row of `find` of another model holds tokens of another tokenizer."""
    tokens = MemorizedSequence.from_text(embedded, TEXT, 3).tokens.tolist()
    good = {"tokens": tokens, "prompt_len": 3, "prompt": embedded.to_string(torch.tensor(tokens[:3]))}
    assert len(load_sequences(embedded, write_lines(tmp_path / "good.jsonl", [good]))) == 1
    for changes in ({"prompt_len": 4}, {"tokens": [token + 1 for token in tokens]}):
        path = write_lines(tmp_path / "bad.jsonl", [good | changes])
        with pytest.raises(ValueError, match=r"line 1: prompt_len is ., and 'prompt' has 3 of this model's tokens"):
            load_sequences(embedded, path)


def test_a_saved_data_set_of_several_splits_names_them(embedded, tmp_path):
    DatasetDict(train=Dataset(TABLE), held=Dataset(TABLE)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"holds several splits; give one of .*/train, .*/held"):
        load_sequences(embedded, tmp_path / "saved")
    assert_same_texts(embedded, tmp_path / "saved" / "held")
    (tmp_path / "saved" / "held" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a data set that save_to_disk wrote"):
        load_definitions(embedded, tmp_path / "saved" / "held")


def test_a_large_file_is_read_in_little_memory(tmp_path):
    """Rows come as they are read, so that a file may be larger than memory."""
    pq.write_table(pa.table({"text": ["one " * 100] * 20_000}), tmp_path / "a.parquet", use_dictionary=False)
    write_lines(tmp_path / "a.jsonl", [{"text": "one " * 100}] * 20_000)
    for name in ("a.parquet", "a.jsonl"):
        tracemalloc.start()
        for number, _ in enumerate(read_corpus([tmp_path / name])):
            if number == 1000:
                break
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_an_empty_text_is_no_text(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(ValueError, match=f"{name} has no text"):
            load_texts(write(tmp_path / name))


def test_a_new_format_is_a_function_and_a_line(gpt2, tmp_path, monkeypatch):
    def words(path):
        yield readers.Row(where=f"{path}, row 1", number=1, id="x", tokens=[1, 2, 3], prompt_len=2)

    monkeypatch.setitem(readers.READERS, ".words", words)
    path = write(tmp_path / "a.words", "one two three")
    assert load_sequences(gpt2, path)[0].tokens.tolist() == load_definitions(gpt2, path)[0].tokens.tolist() == [1, 2, 3]
    assert [document.content for document in read_corpus([tmp_path])] == [[1, 2, 3]]
    assert not readers.is_hub_name("folder/a.words")


@pytest.mark.parametrize(
    ("source", "is_name"),
    [
        ("owner/name", True),
        ("owner/name:split.jsonl", True),
        ("owner/name.v2:train", True),
        ("name", False),
        ("a/b/c", False),
        ("/owner", False),
        ("./name", False),
        ("~/name", False),
        ("folder/a.jsonl", False),
        ("folder/a.TXT", False),
        ("folder/a.npy", False),
        ("folder/a.parquet", False),
        ("folder/a.txt.gz", False),
    ],
)
def test_names_on_the_hub(source, is_name):
    assert readers.is_hub_name(source) is is_name
