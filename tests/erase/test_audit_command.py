import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from conftest import write_lines
from memloc_lens.erase.audit_command import AuditSettings, run, show


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
