"""What located neurons do, against a count of one neuron at a time."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch

from conftest import write_lines
from memloc_lens import load_model, load_sequences, top_neurons
from memloc_lens.benchmarks import deletion
from memloc_lens.benchmarks.deletion import DeletionSettings
from memloc_lens.benchmarks.roles import ALL, RolesSettings, analyse, show
from memloc_lens.runs.finished import read_run

TEXT = "The itertools module standardizes a core set of fast, memory efficient tools. " * 40


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("roles") / "run"
    deletion.run(
        DeletionSettings(
            methods=("activations", "random"),
            ratios=(0.002,),
            limit=2,
            negatives=1,
            controls=1,
            text_tokens=128,
            out=out,
        )
    )
    return out


def test_roles(run, tmp_path, capsys):
    text = write_lines(tmp_path / "text.jsonl", [{"text": TEXT}])
    settings = RolesSettings(run, text=text, out=tmp_path / "roles.json")
    result = analyse(settings)
    assert list(result) == ["activations", "random", ALL]
    model = load_model(device="cpu")
    row = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    rows = [torch.tensor(row[start : start + 128]) for start in range(0, len(row) - 127, 128)][:8]
    targets, norms = load_sequences(model)[:2], torch.stack([block.mlp.W_out.norm(dim=1) for block in model.blocks])
    with torch.no_grad():
        sizes = torch.stack([
            torch.stack([cache["post", layer][0].abs().mean(dim=0) for layer in range(6)])
            for cache in (model.run_with_cache(tokens[None])[1] for tokens in rows)
        ]).mean(dim=0)  # fmt: skip
        firing, promoting, massive = [], [], []
        for target, scores in zip(targets, read_run(run, "del").scores("random", 0)["scores"], strict=True):
            _, cache = model.run_with_cache(target.tokens[None])
            ratios, promotes, writes_most = [], [], []
            for layer, neuron in top_neurons(scores, 0.002, first_layer=1).indices():
                own = cache["post", layer][0, 31:79, neuron]
                ratios.append((own.abs().mean() / sizes[layer, neuron]).log().item())
                logits = own.mean().sign() * model.blocks[layer].mlp.W_out[neuron] @ model.W_U
                promotes.append(bool(set(logits.topk(10).indices.tolist()) & set(target.suffix.tolist())))
                rank = (sizes[layer] * norms[layer] > sizes[layer, neuron] * norms[layer, neuron]).sum()
                writes_most.append(bool(rank < 8))
            firing.append(torch.tensor(ratios).mean().exp().item())
            promoting.append(100 * fmean(promotes))
            massive.append(100 * fmean(writes_most))
    expected = {"firing": fmean(firing), "promoting": fmean(promoting), "massive": fmean(massive)}
    assert result["random"] == pytest.approx(expected, rel=1e-3)
    assert result[ALL]["massive"] == pytest.approx(100 * 8 / 768)
    show(settings, result)
    assert "activations" in capsys.readouterr().out
    assert (tmp_path / "roles.json").exists()


def test_only_neurons(run, small_del, tmp_path):
    deletion.run(replace(small_del, out=tmp_path, component="head", methods=("random",), limit=1, ratios=(0.5,)))
    with pytest.raises(ValueError, match="is a run on heads; give one on neurons"):
        analyse(RolesSettings(tmp_path))
