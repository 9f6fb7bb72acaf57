"""A run folder that something spoiled: the next run repairs it to the same result, or ends in one error of one line."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from conftest import records_of
from memloc_lens import load_model
from memloc_lens.benchmarks import deletion, injection
from memloc_lens.runs.schema import BEFORE
from memloc_lens.runs.settings import RunSettings

Spoil = Callable[[Path], object]


def lines(run: Path) -> list[str]:
    return (run / "records.jsonl").read_text().splitlines(keepends=True)


def with_lines(change: Callable[[list[str]], list[str]]) -> Spoil:
    """Change the list of lines of the records."""
    return lambda run: (run / "records.jsonl").write_text("".join(change(lines(run))))


def with_line(index: int, change: Callable[[dict], object]) -> Spoil:
    """Change one record."""

    def changed(all_lines: list[str]) -> list[str]:
        record = json.loads(all_lines[index])
        made = change(record)
        all_lines[index] = json.dumps(record if made is None else made) + "\n"
        return all_lines

    return with_lines(changed)


def with_json(name: str, change: Callable[[dict], object]) -> Spoil:
    """Change a JSON file."""

    def spoil(run: Path) -> None:
        content = json.loads((run / name).read_text())
        made = change(content)
        (run / name).write_text(json.dumps(content if made is None else made))

    return spoil


def as_bytes(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    """Change a file as bytes."""
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))


def as_folder(name: str) -> Spoil:
    """Put a folder in place of a file."""

    def spoil(run: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return spoil


def as_pipe(name: str) -> Spoil:
    """Put a pipe, from which reading would never end, in place of a file."""

    def spoil(run: Path) -> None:
        (run / name).unlink()
        os.mkfifo(run / name)

    return spoil


def score_files(run: Path) -> list[Path]:
    return sorted((run / "scores").iterdir())


def with_scores(change: Callable[[list[Path]], object]) -> Spoil:
    """Change score files, with the last half of the records gone so that scores are read again."""

    def spoil(run: Path) -> None:
        with_lines(lambda all_lines: all_lines[: -len(all_lines) // 2])(run)
        change(score_files(run))

    return spoil


def swap(files: list[Path]) -> None:
    """Exchange the first file and the last one: other sequences, methods or ratios."""
    one, other = files[0].read_bytes(), files[-1].read_bytes()
    files[0].write_bytes(other)
    files[-1].write_bytes(one)


def all_zero(files: list[Path]) -> None:
    """Whole files with the right names and shapes, and other numbers."""
    for file in files:
        save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)


def each(change: Callable[[bytes], bytes]) -> Callable[[list[Path]], None]:
    def spoil(files: list[Path]) -> None:
        for file in files:
            file.write_bytes(change(file.read_bytes()))

    return spoil


def folders(files: list[Path]) -> None:
    for file in files:
        file.unlink()
        file.mkdir()


def without(name: str) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        del record[name]

    return change


def put(name: str, value: object) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        record[name] = value

    return change


SPOILT: dict[str, Spoil] = {
    "last line cut": as_bytes("records.jsonl", lambda content: content[:-20]),
    "last line without its end": as_bytes("records.jsonl", lambda content: content[:-1]),
    "a line repeated": with_lines(lambda all_lines: [*all_lines, all_lines[-1]]),
    "all lines repeated": with_lines(lambda all_lines: all_lines * 2),
    "a line repeated with another time": with_lines(
        lambda all_lines: [*all_lines, json.dumps(json.loads(all_lines[-1]) | {"localize_seconds": 99.0}) + "\n"]
    ),
    "a key repeated with other values": with_lines(
        lambda all_lines: [*all_lines, json.dumps(json.loads(all_lines[-1]) | {"localize_seconds": 1, "x": 3}) + "\n"]
    ),
    "a line removed": with_lines(lambda all_lines: [*all_lines[:1], *all_lines[2:]]),
    "the first line removed": with_lines(lambda all_lines: all_lines[1:]),
    "lines in another order": with_lines(lambda all_lines: [all_lines[0], *reversed(all_lines[1:])]),
    "records empty": with_lines(lambda all_lines: []),
    "records missing": lambda run: (run / "records.jsonl").unlink(),
    "records a folder": as_folder("records.jsonl"),
    "records a pipe": as_pipe("records.jsonl"),
    "records of zeros": as_bytes("records.jsonl", lambda content: bytes(len(content))),
    "records not UTF-8": as_bytes("records.jsonl", lambda content: b"\xff\xfe" + content),
    "a byte-order mark": as_bytes("records.jsonl", lambda content: b"\xef\xbb\xbf" + content),
    "an empty line": with_lines(lambda all_lines: [all_lines[0], "\n", *all_lines[1:]]),
    "nonsense in the middle": with_lines(lambda all_lines: [all_lines[0], "{nonsense\n", *all_lines[1:]]),
    "JSON nested deep": with_lines(lambda all_lines: [*all_lines, "[" * 200_000 + "\n"]),
    "a record that is a list": with_line(1, lambda record: list(record)),
    "a record that is null": with_lines(lambda all_lines: [*all_lines, "null\n"]),
    "a record that is a number": with_line(-1, lambda record: 3),
    "a record that is a string": with_line(-1, lambda record: "record"),
    "a record that is empty": with_line(-1, lambda record: {}),
    "a record without a sequence": with_line(-1, without("sequence")),
    "a record without a method": with_line(-1, without("method")),
    "a record without a ratio": with_line(-1, without("ratio")),
    "a sequence that is null": with_line(-1, put("sequence", None)),
    "a sequence that is a list": with_line(-1, put("sequence", ["s0"])),
    "a method that is a number": with_line(-1, put("method", 3)),
    "a method of no run": with_line(-1, put("method", "unknown")),
    "a ratio that is a string": with_line(-1, put("ratio", "0.5")),
    "a ratio of no run": with_line(-1, put("ratio", 0.123)),
    "a ratio that is NaN": with_line(-1, put("ratio", float("nan"))),
    "NaN": with_line(-1, put("localize_seconds", float("nan"))),
    "infinity": with_line(-1, put("localize_seconds", float("inf"))),
    "a number too large": with_lines(lambda all_lines: [all_lines[0].replace('_seconds": ', '_seconds": 1e999')]),
    "null in place of a number": with_line(-1, put("localize_seconds", None)),
    "a string in place of a number": with_line(-1, put("localize_seconds", "soon")),
    "a list in place of a number": with_line(-1, put("localize_seconds", [1.0])),
    "a table in place of a number": with_line(-1, put("localize_seconds", {"s": 1.0})),
    "summary a list": with_json("summary.json", lambda summary: [summary]),
    "summary null": with_json("summary.json", lambda summary: "null"),
    "summary empty": as_bytes("summary.json", lambda content: b""),
    "summary cut": as_bytes("summary.json", lambda content: content[:50]),
    "summary missing": lambda run: (run / "summary.json").unlink(),
    "summary a folder": as_folder("summary.json"),
    "configuration a list": with_json("config.json", lambda config: [config]),
    "configuration null": as_bytes("config.json", lambda content: b"null"),
    "configuration a number": as_bytes("config.json", lambda content: b"3"),
    "configuration empty": as_bytes("config.json", lambda content: b""),
    "configuration of nothing": as_bytes("config.json", lambda content: b"{}"),
    "configuration cut": as_bytes("config.json", lambda content: content[:50]),
    "configuration missing": lambda run: (run / "config.json").unlink(),
    "configuration a folder": as_folder("config.json"),
    "configuration a pipe": as_pipe("config.json"),
    **{
        f"{name} of the configuration {value!r}": with_json("config.json", put(name, value))
        for name in ("methods", "ratios", "sequences", "extents", "written_by", "threads", "weights", "seed")
        for value in (None, [None])
    },
    "methods of the configuration without settings": with_json("config.json", put("methods", {"random": 3})),
    "other sequences in the configuration": with_json("config.json", put("sequences", [["s1", "0"], ["s0", "1"]])),
    "fewer sequences in the configuration": with_json("config.json", lambda config: config["sequences"].clear()),
    **{f"configuration without {name}": with_json("config.json", without(name)) for name in ("seed", "weights")},
    "scores cut": with_scores(each(lambda content: content[:40])),
    "scores cut at the end": with_scores(each(lambda content: content[:-3])),
    "scores empty": with_scores(each(lambda content: b"")),
    "scores of zeros": with_scores(each(lambda content: bytes(len(content)))),
    "scores with an absurd header": with_scores(each(lambda content: b"\xff" * 8 + content[8:])),
    "scores with another end": with_scores(each(lambda content: content[:-4] + b"\0\1\0\1")),
    "scores of other numbers": with_scores(all_zero),
    "scores of another shape": with_scores(
        lambda files: [save_file({"scores": load_file(file)["scores"][..., :3].contiguous()}, file) for file in files]
    ),
    "scores without their names": with_scores(
        lambda files: [save_file({"x": load_file(file)["scores"]}, file) for file in files]
    ),
    "scores swapped": with_scores(swap),
    "scores folders": with_scores(folders),
    "scores missing": with_scores(lambda files: [file.unlink() for file in files]),
    "scores a file": with_scores(
        lambda files: (shutil.rmtree(files[0].parent), files[0].parent.write_text("no folder"))
    ),
    "a part left over": lambda run: (run / "records.jsonl.part").write_text("{"),
    "a stale lock": lambda run: (run / "lock.json").write_text('{"host": "gone", "process": 1}'),
    "a damaged lock": lambda run: (run / "lock.json").write_text("["),
}


def spoil_before(run: Path) -> None:
    """Drop the accuracies of a state before."""
    index = next(index for index, line in enumerate(lines(run)) if json.loads(line)["method"] == BEFORE)
    with_line(index, without("accuracies"))(run)


OF_DEL = {
    "another value": with_line(-1, lambda record: record.update(self_acc=record["self_acc"] - 1)),
    "a value of another record": with_line(-1, put("sequence", "s0")),
    "a change of another record": with_line(-1, lambda record: record["acc_changes"].update(s1=-1.0)),
    "a state before without its accuracies": spoil_before,
    "a state before without a metric": with_line(0, without("self_acc")),
    "a record without a metric": with_line(-1, without("neg_acc")),
    "a record without changes": with_line(-1, without("acc_changes")),
    "changes that are a number": with_line(-1, put("acc_changes", 3)),
    "probabilities that are a number": with_line(-1, put("probabilities", 0.5)),
    "tokens that are words": with_line(-1, put("written", ["a", "b"])),
    "changes with NaN": with_line(-1, lambda record: record["acc_changes"].update(s0=float("nan"))),
    "changes without a sequence": with_line(-1, lambda record: record["acc_changes"].__delitem__("s0")),
}
OF_INJ = {
    "another value": with_line(-1, put("auroc", 0.5)),
    "a failure in place of a success": with_line(0, put("succeeded", False)),
    "an injection without its success": with_line(0, without("succeeded")),
    "an injection without its loss": with_line(0, without("loss")),
    "an injection whose loss is NaN": with_line(0, put("loss", float("nan"))),
    "a record without its recall": with_line(-1, without("recall_of_ceiling")),
}


def between_smallest_and_largest(data, *_, **__):
    return SimpleNamespace(confidence_interval=SimpleNamespace(low=data[0].min(), high=data[0].max()))


@pytest.fixture(scope="module")
def finished(small_del, small_inj, tmp_path_factory) -> Iterator[dict[str, RunSettings]]:
    """The settings of a small DEL and a small INJ run, in whose folders they are finished; models are loaded once."""
    model = load_model(small_del.model, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunSettings, "load_model", lambda self: model)
        patch.setattr("scipy.stats.bootstrap", between_smallest_and_largest)  # takes most of the time
        quick = dict(methods=("random", "weight-norm"), limit=2)
        settings = {
            "del": replace(small_del, out=tmp_path_factory.mktemp("spoilt") / "del", ratios=(0.5,), batch=1, **quick),
            "inj": replace(small_inj, out=tmp_path_factory.mktemp("spoilt") / "inj", ratios=(0.2,), **quick),
        }
        run("del", settings["del"])
        run("inj", settings["inj"])
        yield settings


def run(benchmark: str, settings: RunSettings) -> object:
    return (deletion if benchmark == "del" else injection).run(settings)


def outcome(benchmark: str, whole: RunSettings, folder: Path, spoil: Spoil) -> str:
    """Return "repaired" or the error, after checking that it is one of them."""
    shutil.copytree(whole.out, folder)
    spoil(folder)
    try:
        run(benchmark, replace(whole, out=folder))
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "\n" not in said
        assert str(folder) in said
        return said
    assert (folder / "summary.json").read_text() == (whole.out / "summary.json").read_text()
    found, expected = ({str(sorted(record.items())) for record in records_of(out)} for out in (folder, whole.out))
    assert found == expected
    return "repaired"


CASES = [("del", name) for name in (*SPOILT, *OF_DEL)]
CASES += [("inj", name) for name in (*SPOILT, *OF_INJ) if name in OF_INJ or "scores" in name or "line" in name]


@pytest.mark.parametrize(("benchmark", "name"), CASES)
def test_a_spoilt_folder_is_repaired_or_refused(finished, tmp_path, benchmark, name):
    spoil = (SPOILT | (OF_DEL if benchmark == "del" else OF_INJ))[name]
    found = outcome(benchmark, finished[benchmark], tmp_path / "run", spoil)
    if os.environ.get("MEMLOC_OUTCOMES"):
        with Path(os.environ["MEMLOC_OUTCOMES"]).open("a") as file:
            file.write(f"{benchmark}, {name}: {found}\n")
