"""Malformed files of every format: how each is made, and the words of the one line that refuses it."""

import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROWS = np.ones((6, 40), dtype=np.int64)
TEXT = "Return the number of items in the list, or raise an error if there are none."
GOOD = json.dumps({"all": TEXT, "prompt_len": 2})


class Payload:
    """What a pickle could run, were it read as one."""

    def __reduce__(self):
        return (print, ("this must not run",))


def holding(content: bytes | str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def row(**fields: object) -> Callable[[Path], None]:
    """JSON lines, of which the second is bad."""
    return holding(f"{GOOD}\n{json.dumps(fields)}\n")


def tensor(make: Callable[[], object]) -> Callable[[Path], None]:
    return lambda path: torch.save(make(), path)


def array(value: object, cut: int | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = io.BytesIO()
        np.save(content, value, allow_pickle=True)
        path.write_bytes(content.getvalue()[:cut])

    return write


def archive(cut: int | None = None, **arrays: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        path.write_bytes(content.getvalue()[:cut])

    return write


def header(shape: str, data: bytes = b"") -> bytes:
    """An array file that declares a shape."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (63 - (len(text) + 10) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


def zipped(entries: dict[str, bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in entries.items():
                file.writestr(name, content)

    return write


def repacked(path: Path) -> None:
    """A tensor file whose archive is compressed."""
    plain = path.with_name("plain.tensor")
    torch.save(torch.ones(6, 40, dtype=torch.long), plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


class Inflated:
    """A storage of few numbers from which a tensor of many is rebuilt: torch adds what is missing."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (
            torch.ones(8).long().storage(),
            0,
            self.size,
            (self.size[1], 1),
            False,
            {},
        )


def table(
    write: Callable[[pa.Table, Path], object], cut: int | None = None, **columns: object
) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(pa.table(columns), path)
        path.write_bytes(path.read_bytes()[:cut])

    return make


def write_stream(value: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), value.schema) as writer:
        writer.write_table(value)


def write_file(value: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(str(path), value.schema) as writer:
        writer.write_table(value)


def twice(path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)


def pair(prefixes: object, suffixes: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        np.save(path, prefixes)
        np.save(path.with_name("a_suffix.npy"), suffixes)

    return write


IDS = [[1] * 40, [2] * 40]

BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "lines cut short": ("a.jsonl", holding(GOOD + "\n" + GOOD[:-9]), "line 2: not JSON"),
    "a list as a line": ("a.jsonl", holding(GOOD + "\n[1, 2]\n"), "line 2: a list where an object"),
    "null as a line": ("a.jsonl", holding("null\n"), "line 1: a NoneType where an object"),
    "lists nested 200,000 deep": ("a.jsonl", holding("[" * 200_000), "line 1: JSON that cannot be read"),
    "objects nested 200,000 deep": ("a.jsonl", holding('{"text":' * 200_000), "line 1: JSON that cannot be read"),
    "a list file nested 200,000 deep": ("a.json", holding("[" * 200_000), "line 1: JSON that cannot be read"),
    "a number of 5,000 digits": ("a.jsonl", holding('{"tokens": [1, ' + "9" * 5000 + "]}"), "line 1: JSON that cannot"),
    "a field twice": ("a.jsonl", holding('{"text": "a", "text": "b"}'), "line 1: .* field 'text' twice"),
    "a fraction": ("a.jsonl", row(tokens=[1, 1.5]), "line 2: 1.5 is no token id"),
    "a whole float": ("a.jsonl", row(tokens=[1.0, 2.0]), "line 2: 1.0 is no token id"),
    "a truth value": ("a.jsonl", row(tokens=[True, 2]), "line 2: True is no token id"),
    "not a number": ("a.jsonl", row(tokens=[1, float("nan")]), "line 2: nan is no token id"),
    "a null among tokens": ("a.jsonl", row(tokens=[1, None]), "line 2: None is no token id"),
    "a negative id": ("a.jsonl", row(tokens=[1, -1]), "line 2: -1 is no token id"),
    "an id beyond 64 bits": ("a.jsonl", row(tokens=[1, 10**30]), "line 2: token id 10+ overflows 64 bits"),
    "nested tokens": ("a.jsonl", row(tokens=[[1, 2]]), r"line 2: \[1, 2\] is no token id"),
    "tokens as a string": ("a.jsonl", row(tokens="1 2 3"), "line 2: tokens is '1 2 3'"),
    "a text of another type": ("a.jsonl", row(text=["a"]), "line 2: neither 'tokens' nor a text"),
    "half a character": ("a.jsonl", row(all="half \ud83d", prompt_len=1), "line 2: .* half of a character"),
    "a category of numbers": ("a.jsonl", row(all=TEXT, prompt_len=1, category=[1]), r"line 2: category is \[1\]"),
    "a byte that is not UTF-8": (
        "a.jsonl",
        holding(GOOD.encode() + b'\n{"text": "\xff"}'),
        "UTF-8: .* of line 2; data is",
    ),
    "UTF-16": ("a.jsonl", holding(GOOD.encode("utf-16")), "is not a text file in UTF-8"),
    "a zero byte": ("a.jsonl", holding(GOOD + "\n\0\n"), "a zero byte at character 0 of line 2"),
    "zero bytes in plain text": ("a.txt", holding("one\0two"), "a zero byte at character 3"),
    "plain text that is a picture": ("a.png", holding(b"\x89PNG\xff"), "is not a text file in UTF-8: .* plain text"),
    "a list cut short": ("a.json", holding(f"[{GOOD},\n {GOOD}"), "line 2: not JSON"),
    "a list of numbers": ("a.json", holding("[1, 2]"), "row 1: a int where an object"),
    "gzip cut short": (
        "a.jsonl.gz",
        holding(gzip.compress(GOOD.encode())[:-9]),
        "cannot be read: Compressed file ended",
    ),
    "gzip damaged": ("a.jsonl.gz", holding(gzip.compress(GOOD.encode())[:20] + b"\xff" * 40), "cannot be read: "),
    "not gzip": ("a.csv.gz", holding("1,2,3\n"), "cannot be read: Not a gzipped file"),
    "gzip under another name": ("a.jsonl", holding(gzip.compress(GOOD.encode())), "is not a text file in UTF-8"),
    "Zstandard cut short": (
        "a.jsonl.zst",
        holding(pa.compress(GOOD.encode(), "zstd", asbytes=True)[:-4]),
        "cannot be read: Trunc",
    ),
    "not Zstandard": ("a.jsonl.zst", holding(GOOD), "cannot be read: ZSTD decompress failed"),
    "an array compressed once more": ("a.npy.gz", holding(b"\x1f\x8b"), "only text can be; decompress it to a.npy"),
    "a cell that is no id": ("a.csv", holding("1," * 40 + "1\n\n1,x\n"), "line 3: '1,x' is not a line of token ids"),
    "a cell with a fraction": ("a.csv", holding("1,2.5\n"), "line 1: '1,2.5' is not a line of token ids"),
    "a cell of 5,000 digits": ("a.csv", holding("1," + "9" * 5000), "line 1: '1,9+' is not a line of token ids"),
    "a negative cell": ("a.tsv", holding("1\t" * 40 + "2\n3\t-4\n"), r"line 2: '3\\t-4' is not a line of token ids"),
    "a table without content": ("a.csv", holding("id,body\n1,one\n"), "line 1: 'id,body' is not .* name columns"),
    "two columns of one name": ("a.csv", holding("text,text\na,b\n"), "line 1: two columns are named 'text'"),
    "a row with a cell too few": (
        "a.csv",
        holding('all,prompt_len\n"a\n good text",1\n2\n'),
        "line 4: 1 cells, and 2 columns",
    ),
    "an open quote": ("a.csv", holding('id,text\n1,"one\n'), "line 2: not a table"),
    "a column of words as tokens": ("a.csv", holding("id,tokens\n1,1 b 3\n"), "line 2: tokens is '1 b 3'"),
    "a tensor cut short": (
        "a.pt",
        lambda path: (torch.save(torch.tensor(ROWS), path), os.truncate(path, 700)),
        "a tensor that",
    ),
    "code": ("a.pt", tensor(Payload), "is not a tensor that torch.save wrote"),
    "a pickle": ("a.pt", holding(pickle.dumps(Payload())), "is not a tensor that torch.save wrote"),
    "a dictionary": ("a.pt", tensor(lambda: {"tokens": 1}), "holds dict; a tensor of whole numbers"),
    "an expanded tensor": (
        "a.pt",
        tensor(lambda: torch.ones(1, 1, dtype=int).expand(10**6, 10**5)),
        "8 bytes, expanded",
    ),
    "an expanded row": ("a.pt", tensor(lambda: torch.ones(1, 40, dtype=int).expand(6, 40)), "320 bytes, expanded"),
    "a tensor larger than its storage": ("a.pt", tensor(lambda: Inflated((10**5, 10**4))), "a.pt (holds|is not)"),
    "a compressed tensor": ("a.pt", repacked, "torch.save wrote: it is compressed"),
    "a sparse tensor": ("a.pt", tensor(lambda: torch.ones(3, 4, dtype=int).to_sparse()), r"a sparse tensor \[3, 4\]"),
    "a meta tensor": ("a.pt", tensor(lambda: torch.ones(9, 40, dtype=int, device="meta")), r"a meta tensor \[9, 40\]"),
    "an empty tensor": ("a.pt", tensor(lambda: torch.ones(10**12, 0, dtype=int)), "an empty tensor"),
    "a tensor of fractions": ("a.pt", tensor(lambda: torch.ones(3, 40)), r"a tensor torch.float32 \[3, 40\]"),
    "a tensor of truth values": ("a.pt", tensor(lambda: torch.ones(3, 40) > 0), "a tensor torch.bool"),
    "a tensor of one row": ("a.pt", tensor(lambda: torch.ones(40, dtype=int)), r"a tensor torch.int64 \[40\]"),
    "an array cut short": ("a.npy", array(ROWS, cut=300), "is not an array of numbers"),
    "an array of objects": ("a.npy", array(np.array([[1, Payload()]], dtype=object)), "is not an array of numbers"),
    "an array of words": ("a.npy", array(ROWS.astype(str)), "is not an array of numbers"),
    "an array of fractions": ("a.npy", array(ROWS / 2), r"a tensor torch.float64 \[6, 40\]"),
    "an array that declares too much": (
        "a.npy",
        holding(header("(1000000000000, 50)", b"1")),
        "is not an array of numbers",
    ),
    "an array with absurd counts": ("a.npy", holding(header("(1" + "0" * 30 + ", 50)")), "is not an array of numbers"),
    "an array of no columns": ("a.npy", holding(header("(1000000000000, 0)")), "holds an empty tensor"),
    "an array of negative ids": ("a.npy", array(-ROWS), "row 1: -1 is no token id"),
    "no array": ("a.npy", holding("none"), "is not an array of numbers"),
    "half of a pair": ("a_prefix.npy", array(ROWS), "a_suffix.npy cannot be read: No such file"),
    "a pair of different lengths": ("a_prefix.npy", pair(ROWS, ROWS[:2]), "has 6 rows and .* has 2"),
    "an archive cut short": ("a.npz", archive(cut=100, tokens=ROWS), "is not an archive that numpy.savez wrote"),
    "an archive of other arrays": ("a.npz", archive(ids=ROWS), "holds ids; it must hold tokens, or prefix and suffix"),
    "an archive of half a pair": ("a.npz", archive(prefix=ROWS), "holds prefix; it must hold tokens, or"),
    "an archive of unequal halves": ("a.npz", archive(prefix=ROWS, suffix=ROWS[:2]), "has 6 rows and .* has 2"),
    "an archive of objects": ("a.npz", archive(tokens=np.array([[None]], dtype=object)), "is not an archive that"),
    "an archive that declares too much": (
        "a.npz",
        zipped({"tokens.npy": header("(10000000000000, 50)")}),
        "is not an archive",
    ),
    "Parquet cut short": ("a.parquet", table(pq.write_table, cut=-20, tokens=IDS), "is not a Parquet file"),
    "no Parquet": ("a.parquet", holding(b"PAR1\xff"), "is not a Parquet file"),
    "Parquet without content": ("a.parquet", table(pq.write_table, ids=IDS), "has no column .*; it has ids"),
    "Parquet with a name twice": ("a.parquet", twice, "has two columns named 'text'"),
    "Parquet of fractions": ("a.parquet", table(pq.write_table, tokens=[[1.5, 2.0]]), "row 1: 1.5 is no token id"),
    "Parquet with text that is not UTF-8": (
        "a.parquet",
        table(pq.write_table, text=pa.array([b"\xff"]).view(pa.string())),
        "is not a Parquet file: after row 0",
    ),
    "Arrow cut short": ("a.arrow", table(write_file, cut=-200, tokens=IDS), "is not an Arrow file or stream"),
    "an Arrow stream cut short": (
        "a.arrow",
        table(write_stream, cut=-300, tokens=IDS),
        "is not an Arrow file or stream",
    ),
    "no Arrow": ("a.feather", holding("none"), "is not an Arrow file or stream"),
    "a pipe": ("a.jsonl", os.mkfifo, "is a pipe, a socket or a device"),
    "a pipe as a tensor": ("a.pt", os.mkfifo, "is a pipe, a socket or a device"),
    "a device": ("a.csv", lambda path: path.symlink_to("/dev/zero"), "is a pipe, a socket or a device"),
    "half of a pair that is a pipe": (
        "a_prefix.npy",
        lambda path: (array(ROWS)(path), os.mkfifo(path.with_name("a_suffix.npy"))),
        "a_suffix.npy is a pipe",
    ),
    "nothing": ("a.parquet", lambda path: None, "no .* at "),
    "a link to nothing": ("a.jsonl", lambda path: path.symlink_to("nowhere"), "no .* at "),
    "a link to itself": ("a.jsonl", lambda path: path.symlink_to(path), "cannot be read: Too many levels"),
}
"""By name: the file, what writes it, and words of the error, whoever reads it."""

for _suffix in (".json", ".jsonl", ".csv", ".npy", ".npz", ".pt", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst"):
    BAD[f"an empty {_suffix}"] = (f"a{_suffix}", holding(b""), r"a\.")
