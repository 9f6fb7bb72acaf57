import json
import re
import shutil

import pytest

from conftest import keys_of, records_of, write_lines
from memloc_lens.benchmarks.deletion import DeletionSettings
from memloc_lens.runs.finished import read_run
from memloc_lens.runs.methods import name_of
from memloc_lens.runs.schema import BEFORE, INJECTION


@pytest.fixture
def run(whole_del, tmp_path):
    """A copy of a finished run, to be spoiled."""
    return shutil.copytree(whole_del.out, tmp_path / "run")


def test_records_of_methods_and_their_order(whole_del: DeletionSettings):
    run = read_run(whole_del.out, "del")
    assert run.records == [json.loads(line) for line in (whole_del.out / "records.jsonl").read_text().splitlines()
                           if json.loads(line)["method"] != BEFORE]  # fmt: skip
    assert run.methods == [name_of(localizer) for localizer in whole_del.localizers()]
    assert run.ratios == sorted(whole_del.ratios)
    assert run.config == json.loads((whole_del.out / "config.json").read_text())
    of_random = run.at("random", 0.5)
    assert list(of_random) == ["s0", "s1", "s2"]
    assert all((record["method"], record["ratio"]) == ("random", 0.5) for record in of_random.values())
    assert run.scores("random", 2)["scores"].shape == (1, 3, 128)


def test_the_state_before(run):
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    before = [line for line in lines if line["method"] == BEFORE]
    assert read_run(run, "del").before == {record["sequence"]: record for record in before}
    assert len(before) == 3
    lines[0]["self_acc"] += 1
    assert lines[0]["method"] == BEFORE
    write_lines(run / "records.jsonl", lines)
    with pytest.raises(ValueError, match="line 1: its values are not those that were written"):
        read_run(run, "del")


def test_methods(whole_del):
    run = read_run(whole_del.out, "del")
    assert run.check_method("random") == "random"
    with pytest.raises(ValueError, match="whole has no method 'other'; it has hard-concrete, slimming"):
        run.check_method("other")


def test_injections_are_left_out(whole_inj):
    run = read_run(whole_inj.out, "inj")
    assert run.before == {}
    assert len(run.records) == len([r for r in records_of(whole_inj.out) if r["method"] != INJECTION])
    assert INJECTION not in run.methods
    assert run.ratios == [0.2]  # at 1% every injection failed


def test_ratios(whole_del):
    run = read_run(whole_del.out, "del")
    assert run.check_ratio(None, 0.5) == 0.5
    assert run.check_ratio(0.1, 0.5) == 0.1
    for ratio, default in ((0.3, 0.5), (None, None)):
        with pytest.raises(ValueError, match=rf"has no records at the ratio {ratio}; it has 0\.1, 0\.5"):
            run.check_ratio(ratio, default)


def test_records_of_a_later_run_that_was_cut_short_are_left_out(run):
    whole = read_run(run, "del")
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    write_lines(run / "records.jsonl", [*records, records[-1] | {"ratio": 0.9}, records[-1] | {"method": "new"}])
    assert keys_of(read_run(run, "del").records) == keys_of(whole.records)


def test_folders_that_hold_no_such_run(run, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere holds no finished run: .*summary\.json: No such file"):
        read_run(tmp_path / "nowhere", "del")
    with pytest.raises(ValueError, match="run is a run of del; give one of inj"):
        read_run(run, "inj")
    for name, message in (("records.jsonl", "line 1: not a record"), ("summary.json", "run holds no finished run: ")):
        content = (run / name).read_text()
        (run / name).write_text("{nonsense\n")
        with pytest.raises(ValueError, match=message):
            read_run(run, "del")
        (run / name).write_text(content)
    whole = read_run(run, "del")
    for spoil in (lambda file: file.write_bytes(file.read_bytes()[:40]), lambda file: file.unlink()):
        spoil(run / "scores" / "random-00000.safetensors")
        with pytest.raises(ValueError, match=r"random-00000\.safetensors holds no scores"):
            whole.scores("random", 0)


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
@pytest.mark.parametrize("content", ["[]", "null", "", "{", '{"benchmark": "del"}', '{"methods": 3}', "[" * 100_000])
def test_damaged_tables_are_one_error(run, name, content):
    (run / name).write_text(content)
    try:
        read_run(run, "del")
    except ValueError as error:
        said = str(error)
    else:
        said = ""
        assert name == "config.json"  # without a fingerprint, as old runs
        assert content.startswith('{"')
    assert "\n" not in said


@pytest.mark.parametrize("value", ["NaN", "null", '"x"', "1e999", "-3.25"])
def test_damaged_records_are_one_error(run, value):
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    lines[-1] = re.sub('"self_acc": [^,]*', f'"self_acc": {value}', lines[-1])
    (run / "records.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=rf"records\.jsonl, line {len(lines)}: .*; remove the line to have"):
        read_run(run, "del")


def test_scores_of_another_batch_are_refused(run):
    shutil.copy(run / "scores" / "random-00000.safetensors", run / "scores" / "random-00002.safetensors")
    with pytest.raises(ValueError, match=r"random-00002.* holds no scores: they belong to random-00000\.safetensors"):
        read_run(run, "del").scores("random", 2)
