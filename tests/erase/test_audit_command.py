import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from conftest import Killed, records_of, write_lines
from memloc_lens import Contrast, Gradient, MemorizedSequence, load_model, load_sequences
from memloc_lens.erase import Budget, Spared, choose, parts
from memloc_lens.erase.audit_command import AuditSettings, run, show
from memloc_lens.erase.erasing import described


@pytest.fixture
def folders(recited, tmp_path):
    """A model that recites sequences, and one that has lost an MLP."""
    erased = shutil.copytree(recited / "model", tmp_path / "erased")
    model = AutoModelForCausalLM.from_pretrained(erased)
    model.transformer.h[1].mlp.c_proj.weight.data.zero_()
    model.save_pretrained(erased)
    return recited / "model", erased


def settings_for(folders, recited, **changes) -> AuditSettings:
    original, erased = folders
    given = dict(data=recited / "data.jsonl", max_steps=1, limit=2, samples=10, device="cpu", quiet=True)
    return AuditSettings(str(original), erased, **given | changes)


def test_an_audit_is_written_into_the_folder(folders, recited, capsys):
    settings = settings_for(folders, recited)
    found = run(settings)
    written = json.loads((folders[1] / "audit.json").read_text())
    assert written["texts"]["targets"] == found["texts"]["targets"] == ["s0", "s1"]
    stays = {name: group for name, group in written["accuracy"]["groups"].items() if name != "controls"}
    assert sum(group["before"]["n"] for group in stays.values()) == 4  # s2 to s5
    assert (folders[1] / "AUDIT.md").read_text().startswith("#")
    show(settings, found)
    assert "before: 8.0 tokens recited, extraction strength 1.00" in capsys.readouterr().out


def test_the_sequences_are_those_that_the_folder_names(folders, recited):
    (folders[1] / "erasure.json").write_text(json.dumps({"sequences": [["s3", "hash"], ["s1", "hash"]]}))
    found = run(settings_for(folders, recited, limit=0))
    assert found["texts"]["targets"] == ["s1", "s3"]
    (folders[1] / "erasure.json").write_text(json.dumps({"sequences": [["elsewhere", "hash"]]}))
    with pytest.raises(ValueError, match=r"has none of the sequences that .*erasure\.json names"):
        run(settings_for(folders, recited))


def test_a_killed_command_resumes_and_leaves_the_folder_alone(folders, recited, dies_after, monkeypatch):
    erased = folders[1]
    before = {path.name: path.read_bytes() for path in erased.iterdir()}
    settings = settings_for(folders, recited)
    dies_after(4)
    with pytest.raises(Killed):
        run(settings)
    assert {path.name: path.read_bytes() for path in erased.iterdir()} == before
    assert settings.work == erased.parent / "erased.audit"
    first = records_of(settings.work)
    assert len(first) == 4
    dies_after(0)
    found = run(settings)
    assert records_of(settings.work)[:4] == first
    assert {path.name for path in erased.iterdir()} == {*before, "AUDIT.md", "audit.json"}

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(parts, "state_of", never)
    monkeypatch.setattr(parts, "relearn", never)
    assert run(settings) == found
    with safe_open(erased / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    weights["transformer.h.0.mlp.c_proj.weight"][0, 0] += 1
    save_file(weights, erased / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError):
        run(settings)


def test_it_is_written_elsewhere(folders, recited, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = settings_for(folders, recited, out=Path("audits/first"))
    run(settings)
    assert sorted(path.name for path in Path("audits").iterdir()) == ["first", "first.audit"]
    assert not (folders[1] / "audit.json").exists()
    with (
        FileLock("audits/first.audit/run.lock"),
        pytest.raises(ValueError, match=r"first\.audit is in use.*with --out"),
    ):
        run(settings)


def test_the_context_of_the_erasure_is_left_out(folders, recited, capsys):
    rows = [json.loads(line) for line in (recited / "data.jsonl").read_text().splitlines()]
    context = [MemorizedSequence(row["tokens"], row["prompt_len"], "c", row["category"]) for row in rows[2:4]]
    known = Contrast(Gradient(context=context), context)  # twice, of which one counts
    model = load_model(folders[0], device="cpu")
    targets = load_sequences(model, recited / "data.jsonl")[:2]
    erasure = choose(model, targets, Gradient()(model, targets), Spared(), Budget(1e9, 100))
    about = described(erasure, model, targets, known)
    assert [id for id, _ in about["context"]] == ["c", "c"]
    (folders[1] / "erasure.json").write_text(json.dumps(about))
    settings = settings_for(folders, recited, negatives=1)
    found = run(settings)
    stays = [id for name in ("near-duplicates", "related", "unrelated") for id in found["texts"].get(name, [])]
    assert found["texts"]["targets"] == ["s0", "s1"]
    assert stays == ["s4"]
    assert found["texts"]["context of the erasure, left out"] == ["s2", "s3"]
    assert "| context of the erasure, left out | 2 |" in (folders[1] / "AUDIT.md").read_text()
    show(settings, found)
    assert "context of the erasure, left out: 2 of the others" in capsys.readouterr().out


def test_given_prompts_need_a_tokenizer(folders, recited, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"id": "s0", "prompt": "One"}])
    with pytest.raises(ValueError, match="no tokenizer to read them with"):
        run(settings_for(folders, recited, prompts=prompts))
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty\.jsonl has no prompts"):
        run(settings_for(folders, recited, prompts=empty))


def test_bad_settings_are_one_error(folders, recited, tmp_path):
    with pytest.raises(ValueError, match="which is no folder"):
        run(AuditSettings("embedded", tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="give the sequences as --data"):
        run(settings_for(folders, recited, data=None))
    with pytest.raises(ValueError, match="max_steps is -1"):
        settings_for(folders, recited, max_steps=-1)
    few = write_lines(tmp_path / "few.jsonl", [{"tokens": [1, 2, 3, 4], "prompt_len": 2, "id": "c"}])
    with pytest.raises(ValueError, match="1 texts were never seen, and 2 sequences are audited"):
        run(settings_for(folders, recited, controls=few))
