import json
from dataclasses import replace

import pytest
import torch

from memloc_lens import HardConcrete, IntegratedGradients, Neurons, Slimming, inject, load_definitions, top_neurons
from memloc_lens.benchmarks import insertion, tuning
from memloc_lens.benchmarks.insertion import Settings, run, score_metrics
from memloc_lens.metrics import recall

SMALL = Settings(
    ratios=(0.05, 0.001),
    limit=2,
    max_steps=60,
    device="cpu",
    methods=("hard-concrete", "slimming", "integrated-gradients", "activations", "weight-norm", "random"),
    hard_concrete=HardConcrete(steps=4),
    slimming=Slimming(steps=4),
    integrated_gradients=IntegratedGradients(steps=2),
)


def records_of(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_seconds")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("inj") / "whole"
    return out, run(replace(SMALL, out=out))


def test_one_record_of_each_kind(whole):
    out, summary = whole
    keys = [(record["sequence"], record["method"], record["ratio"]) for record in records_of(out)]
    of_injections = [
        (text, "injection", ratio) for text in ("definition-06", "definition-07") for ratio in SMALL.ratios
    ]
    scored = [(text, method, 0.05) for text in ("definition-06", "definition-07") for method in SMALL.methods]
    assert sorted(keys) == sorted(of_injections + scored)
    assert summary == json.loads((out / "summary.json").read_text())


def test_failed_injections_are_listed_and_not_scored(whole):
    _, summary = whole
    assert summary["injections"]["0.05"]["failed"] == []
    assert summary["injections"]["0.05"]["succeeded"] == 2
    assert summary["injections"]["0.001"]["failed"] == ["definition-06", "definition-07"]
    assert summary["injections"]["0.001"]["succeeded"] == 0
    assert all("0.001" not in cells for cells in summary["methods"].values())


def test_records_against_a_fresh_injection(whole, embedded):
    out, _ = whole
    text = load_definitions(embedded)[1]
    record = next(r for r in records_of(out) if (r["sequence"], r["method"]) == (text.id, "activations"))
    with inject(embedded, text, 0.05, seed=1, lr=0.01, max_steps=60) as injected:
        scores = SMALL.localizer("activations")(embedded, text)
        norms = torch.stack([block.mlp.W_out.detach().norm(dim=1) for block in embedded.blocks])
    gold = injected.neurons.members
    for share in (0.05, 0.1, 0.25):
        taken = round(share * 768)
        found = sum(
            len(set(layer.topk(taken).indices.tolist()) & set(members.nonzero().flatten().tolist()))
            for layer, members in zip(scores, gold, strict=True)
        )
        assert record[f"recall@{share:g}"] == pytest.approx(100 * found / gold.sum().item(), abs=1e-4)
    above = (scores[gold][:, None] > scores[~gold][None]).double() + (scores[gold][:, None] == scores[~gold]) / 2
    assert record["auroc"] == pytest.approx(above.mean().item(), abs=1e-6)
    by_norm = (norms[gold][:, None] > norms[~gold][None]).double().mean().item()
    assert record["auroc_net"] == pytest.approx(above.mean().item() - by_norm, abs=2e-6)
    made = next(r for r in records_of(out) if (r["sequence"], r["method"], r["ratio"]) == (text.id, "injection", 0.05))
    assert made["steps"] == injected.steps
    assert made["auroc_weight_norm"] == pytest.approx(by_norm, abs=1e-6)


def test_the_gold_itself_reaches_the_ceiling_and_nothing_is_above(embedded):
    for seed in range(5):
        with inject(embedded, load_definitions(embedded)[0], 0.01, seed=seed, max_steps=1) as injected:
            gold = injected.neurons
        metrics = score_metrics(gold.members.float(), gold, 0.01)
        assert metrics["recall@0.01"] == metrics["recall_ceiling"] < 100
        assert metrics["recall_of_ceiling"] == metrics["recall@1"] == metrics["recall_global@0.01"] == 100
        assert metrics["auroc"] == metrics["average_precision"] == 1
        curve = [value for name, value in metrics.items() if name.startswith("recall@")]
        assert curve == sorted(curve)


def test_chance_finds_its_share():
    draw = torch.Generator().manual_seed(0)
    found = {0.01: [], 0.05: []}
    for _ in range(200):
        members = torch.zeros(4 * 300, dtype=torch.bool)
        members[torch.randperm(1200, generator=draw)[:60]] = True
        gold, scores = Neurons(members.view(4, 300)), torch.rand(4, 300, generator=draw)
        for share in found:
            found[share].append(recall(gold, top_neurons(scores, share, rounding="nearest")))
    for share, values in found.items():
        sample = torch.tensor(values)
        assert (sample.mean() - 100 * share).abs() < 4 * sample.std() / 200**0.5


def test_a_killed_run_goes_on_to_the_same_records(whole, tmp_path, monkeypatch):
    out, summary = whole
    from memloc_lens.benchmarks import records

    append = records.RunFolder.append
    for stop in (1, 4, 10):

        def append_or_die(self, record, stop=stop):
            append(self, record)
            if len(self.records) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(records.RunFolder, "append", append_or_die)
        with pytest.raises(KeyboardInterrupt):
            run(replace(SMALL, out=tmp_path / "killed"))
    monkeypatch.setattr(records.RunFolder, "append", append)
    assert run(replace(SMALL, out=tmp_path / "killed")) == summary
    assert records_of(tmp_path / "killed") == records_of(out)


def test_a_finished_run_injects_nothing(whole, monkeypatch):
    out, summary = whole
    monkeypatch.setattr(insertion, "inject", None)
    assert run(replace(SMALL, out=out)) == summary


def test_kept_norms_leave_no_leak(tmp_path):
    summary = run(replace(SMALL, ratios=(0.05,), keep_norms=True, methods=("weight-norm",), limit=3, out=tmp_path))
    free = summary["injections"]["0.05"]["auroc_weight_norm"]
    assert summary["injections"]["0.05"]["succeeded"] == 3
    assert 0.4 < free["mean"] < 0.6


def test_tuning_chooses_from_the_dev_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "GRIDS", {"slimming": {"lr": (1e-3, 0.1), "penalty_each": (0.02,)}})
    settings = replace(SMALL, ratios=(0.05,), tune=True, slimming=Slimming(steps=20), out=tmp_path)
    summary = run(settings)
    means = {name: cells["0.05"]["recall_of_ceiling"]["mean"] for name, cells in summary["tried"].items()}
    assert list(means) == ["slimming lr=0.001 penalty=92", "slimming lr=0.1 penalty=92"]
    assert summary["chosen"] == {"slimming": max(means, key=means.__getitem__)}
    lines = [json.loads(line) for line in (tmp_path / "tuning" / "records.jsonl").read_text().splitlines()]
    assert {line["sequence"] for line in lines} == {f"definition-0{place}" for place in range(1, 6)}

    from memloc_lens.benchmarks.runner import parse

    chosen = parse(Settings, ["--config", str(tmp_path / "tuning" / "tuned.toml"), "--limit", "3"], "door")
    assert chosen.limit == 3
    assert f"slimming lr={chosen.slimming.lr:g} penalty={chosen.slimming.penalty:g}" == summary["chosen"]["slimming"]
    with pytest.raises(ValueError, match="have a grid to try"):
        run(replace(settings, methods=("random",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": (1.0,)}, "nothing to find"),
        ({"ratios": (0.0,)}, "above 0 and at most 1"),
        ({"ratios": (0.0001,)}, "takes none of"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"limit": -1}, "limit is -1"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"data": "/nowhere.jsonl"}, "no texts at '/nowhere.jsonl'"),
    ],
)
def test_bad_settings_are_refused_before_long_work(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(insertion, "inject", None)
    with pytest.raises(ValueError, match=message):
        run(replace(SMALL, out=tmp_path / "run", **change))
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_a_model_without_a_tokenizer_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="no tokenizer to read texts with"):
        run(replace(SMALL, model=str(folder), ratios=(0.05,), out=tmp_path / "run"))
