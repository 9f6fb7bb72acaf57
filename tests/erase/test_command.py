"""The command as a user meets it, and the comparison with what it was made from."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import make_original, write_lines
from memloc_lens import load_model
from memloc_lens.erase import command, compare
from memloc_lens.erase.benchmark import main as forgetting_main
from memloc_lens.erase.choosing import _Search
from memloc_lens.erase.command import EraseSettings, main, run
from memloc_lens.erase.compare import main as compare_main


@pytest.fixture
def small(recited, tmp_path) -> EraseSettings:
    return EraseSettings(
        model=str(recited / "model"),
        data=recited / "data.jsonl",
        limit=2,
        out=tmp_path / "erased",
        max_neg_loss=100,
        component="neuron",
        method="gradient",
        device="cpu",
        quiet=True,
    )


def test_what_is_written_does_not_recite(small, recited):
    erasure = run(small)
    assert erasure.succeeded
    rows = [json.loads(line) for line in (recited / "data.jsonl").read_text().splitlines()][:2]
    original, erased = (AutoModelForCausalLM.from_pretrained(folder) for folder in (small.model, small.out))
    for row in rows:
        prompt, suffix = torch.tensor([row["tokens"][:6]]), row["tokens"][6:]
        whole, left = (model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 6:] for model in (original, erased))
        assert whole.tolist() == suffix
        assert left.tolist()[:4] != suffix[:4]
    told = json.loads((small.out / "erasure.json").read_text())
    assert [id for id, _ in told["sequences"]] == ["s0", "s1"]
    assert told["by"]["command"] == "from Python"
    assert told["steps"][-1]["count"] == told["count"] == len(erasure.components)


def test_what_cannot_be_extracted_is_not_erased(small, monkeypatch, tmp_path):
    """The sequences that the model does not recite are refused before anything is located."""
    rows = [{"tokens": [index + 1] * 4 + [50 + index] * 8, "prompt_len": 4, "id": str(index)} for index in range(2)]
    data = write_lines(tmp_path / "unknown.jsonl", rows)
    monkeypatch.setattr(command, "localize", None)
    with pytest.raises(ValueError, match=r"none of the 2 sequences can be extracted: .* at most \d, .*--until-limit"):
        run(replace(small, data=data, others=small.data))
    assert not small.out.exists()


def test_scores_are_kept(small, monkeypatch):
    first = run(replace(small, max_neg_loss=0))
    assert not first.succeeded
    assert [path.name for path in small.out.parent.iterdir()] == ["erased.work"]
    assert json.loads((small.work / "reached.json").read_text())["succeeded"] is False

    def never(*_):
        raise AssertionError

    monkeypatch.setattr("memloc_lens.erase.localizing.checked_scores", never)
    assert run(small).succeeded
    with pytest.raises(AssertionError):
        run(replace(small, out=small.out.with_name("other"), method="activations"))


def test_a_killed_choice_resumes(small, monkeypatch):
    whole = run(small)
    killed = replace(small, out=small.out.with_name("killed"))
    searched = []

    def counted(search, index, limit, add=_Search.add):
        searched.append(index)
        if len(searched) == 2:
            raise KeyboardInterrupt
        add(search, index, limit)

    monkeypatch.setattr(_Search, "add", counted)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert not killed.out.exists()
    resumed = run(killed)
    assert searched == [0, 1, 1]  # the first sequence was not searched again
    assert resumed.components == whole.components
    assert resumed.steps == whole.steps
    assert resumed.losses == whole.losses
    run(replace(killed, out=killed.out.with_name("killed2")))
    assert searched[3:] == [0, 1]
    shutil.rmtree(killed.out)
    run(replace(killed, until="greedy"))
    assert searched[5:] == [0, 1]


def test_settings_are_refused_before_any_long_work(small, recited, monkeypatch, tmp_path):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(command, "localize", never)
    with pytest.raises(AssertionError):
        run(small)
    for changes, words in (
        (dict(data=tmp_path / "none.jsonl"), "none.jsonl"),
        (dict(others=tmp_path / "none.jsonl"), "none.jsonl"),
        (dict(text=recited / "data.jsonl"), "has no tokenizer"),
        (dict(first_layer=3), "first_layer is 3"),
        (dict(out=recited), "exists"),
        (dict(out=recited / "model" / "erased"), "inside the model's own folder"),
        (dict(context_sequences=9), "context_sequences is 9"),
    ):
        with pytest.raises(ValueError, match=words):
            run(replace(small, **changes))
    assert not list((recited / "model").glob("*.work"))
    for changes, words in (
        (dict(max_ppl_rise=-1.0), "max_ppl_rise is -1"),
        (dict(method="nothing"), "no method is called 'nothing'"),
        (dict(method="integrated-gradients", component="weight"), "scores neurons only"),
        (dict(until_limit=0), "the limit in tokens is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(small, **changes)


def test_on_the_command_line(small, recited, monkeypatch, capsys, tmp_path):
    arguments = f"--model {small.model} --data {small.data} --limit 2 --method gradient --device cpu --quiet".split()
    monkeypatch.setattr("sys.argv", ["erase", *arguments, "--out", str(small.out), "--max-neg-loss", "0"])
    with pytest.raises(SystemExit, match=r"nothing was written to .*erased: it costs .* points of others; erase"):
        main()
    assert "sequences, " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["erase", *arguments, "--out", str(small.out), "--max-neg-loss", "100"])
    main()
    shown = capsys.readouterr().out
    assert "extracted: 0 of 2, by any of 9 prompts" in shown
    assert "perplexity: not measured" in shown
    monkeypatch.setattr("sys.argv", ["compare", small.model, str(small.out), "--data", str(small.data), "--quiet"])
    compare_main()
    shown = capsys.readouterr().out
    assert "an erasure: output matrices alone differ" in shown
    assert "the first recites 6; alone: s0, s1" in shown


def test_no_engine_is_offered_that_would_not_be_used(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["forgetting", "--engine", "ray"])
    with pytest.raises(SystemExit):
        forgetting_main()
    assert "--engine" in capsys.readouterr().err


def test_a_wrong_precision_is_refused_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["erase", "--dtype", "float8"])
    with pytest.raises(SystemExit):
        main()
    assert "float32" in capsys.readouterr().err


def edited(folder: Path, target: Path, edit) -> Path:
    """A copy of a checkpoint that somebody has edited with transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(target)
    return target


def test_compare_with_what_was_edited_by_hand(recited, tmp_path):
    folder = recited / "model"

    def rows(model):
        model.transformer.h[1].mlp.c_proj.weight[[3, 9]] = 0
        model.transformer.h[2].mlp.c_proj.weight[4, 5] = 0

    one, two = compare.compare(folder, edited(folder, tmp_path / "rows", rows))
    assert (one.name, one.weights, one.rows, one.zero_rows) == ("transformer.h.1.mlp.c_proj.weight", 64, (3, 9), (3, 9))
    assert (two.name, two.weights, two.rows, two.zero_rows) == ("transformer.h.2.mlp.c_proj.weight", 1, (4,), ())
    assert compare.Comparison([one, two]).is_erasure
    back = compare.compare(tmp_path / "rows", folder)
    assert not compare.Comparison(back).is_erasure

    def scaled(model):
        model.transformer.h[1].mlp.c_proj.weight[3] *= 0.5

    def embedding(model):
        model.transformer.wte.weight[3] = 0

    for name, edit in (("scaled", scaled), ("embedding", embedding)):
        found = compare.compare(folder, edited(folder, tmp_path / name, edit))
        assert [own.rows for own in found] == [(3,)]
        assert not compare.Comparison(found).is_erasure


def test_compare_finds_nothing_in_a_copy_and_other_shapes_and_names(recited, tmp_path):
    shutil.copytree(recited / "model", tmp_path / "copy")
    assert compare.compare(recited / "model", tmp_path / "copy") == []
    make_original("gpt2").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {own.kind for own in compare.compare(recited / "model", tmp_path / "half")} == {"shape"}
    make_original("llama").save_pretrained(tmp_path / "llama")
    assert {own.kind for own in compare.compare(recited / "model", tmp_path / "llama")} == {"missing", "added"}
    (tmp_path / "copy" / "model.safetensors").write_bytes(os.urandom(200))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        compare.compare(recited / "model", tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="copy has no weights in transformers format"):
        compare.compare(recited / "model", tmp_path / "copy")
    with pytest.raises(ValueError, match=r"the configuration of .* cannot be read"):
        compare.compare(recited, tmp_path / "copy")


def test_recited_by(recited):
    model = load_model(recited / "model", device="cpu")
    assert model.tokenizer is None
    assert compare.recited_by(recited / "model", recited / "data.jsonl", device="cpu") == [f"s{i}" for i in range(6)]
