import json
from dataclasses import dataclass, replace
from statistics import fmean

import engines
import pytest
import torch
from safetensors.torch import load_file

from conftest import Killed, keys_of, records_of
from memloc_lens import (
    COMPONENTS,
    LOCALIZERS,
    Activations,
    Neurons,
    Slimming,
    WeightNorm,
    inject,
    load_definitions,
    load_model,
    top_components,
    top_neurons,
)
from memloc_lens.benchmarks import injection, tuning
from memloc_lens.benchmarks.injection import TIMES, InjectionSettings, metrics_at, run, score_metrics, show
from memloc_lens.metrics import recall
from memloc_lens.runs.command_line import parse
from memloc_lens.runs.methods import name_of
from memloc_lens.runs.schema import INJECTION


def summary_of(settings: InjectionSettings) -> dict:
    return json.loads((settings.out / "summary.json").read_text())


def texts_of(settings: InjectionSettings) -> list[str]:
    return [f"s{index}" for index in range(settings.limit)]


def test_one_record_for_each_injection_and_each_method_that_it_is_found_by(whole_inj):
    holds, too_few = whole_inj.ratios
    wanted = [(text, INJECTION, ratio) for text in texts_of(whole_inj) for ratio in whole_inj.ratios]
    wanted += [(text, method, holds) for text in texts_of(whole_inj) for method in LOCALIZERS]
    assert sorted(keys_of(records_of(whole_inj.out))) == sorted(wanted)
    summary = summary_of(whole_inj)
    assert list(summary["methods"]) == list(LOCALIZERS)
    assert all(list(cells) == [str(holds)] for cells in summary["methods"].values())
    assert not list((whole_inj.out / "scores").glob(f"*-{too_few:g}-*"))


def test_the_summary_is_of_the_records(whole_inj):
    summary, records, ratio = summary_of(whole_inj), records_of(whole_inj.out), whole_inj.ratios[0]
    for method in LOCALIZERS:
        cells = summary["methods"][method][str(ratio)]
        recorded = next(record for record in records if record["method"] == method)
        assert set(cells) == {metric.name for metric in metrics_at(ratio) if metric.name in recorded}
        for metric in ("recall@0.2", "recall@0.4", "recall@1", "recall_of_ceiling", "auroc", "auroc_net"):
            values = [record[metric] for record in records if record["method"] == method]
            assert cells[metric]["mean"] == pytest.approx(fmean(values))
            assert cells[metric]["n"] == len(values) == whole_inj.limit
    steps = [record["steps"] for record in records if (record["method"], record["ratio"]) == (INJECTION, ratio)]
    assert summary["injections"][str(ratio)]["steps"]["mean"] == pytest.approx(fmean(steps))


def test_failed_injections_are_listed_and_not_scored(whole_inj):
    holds, too_few = (summary_of(whole_inj)["injections"][str(ratio)] for ratio in whole_inj.ratios)
    assert holds["failed"] == []
    assert holds["succeeded"] == holds["texts"] == whole_inj.limit
    assert holds["loss"]["high"] < whole_inj.target_loss < too_few["loss"]["low"]
    assert too_few["failed"] == texts_of(whole_inj)
    assert too_few["succeeded"] == 0
    assert too_few["steps"]["mean"] == whole_inj.max_steps


@pytest.mark.parametrize("component", ["neuron", "weight"])
def test_records_against_a_fresh_injection(small_inj, tmp_path, component):
    ratio = 0.2 if component == "neuron" else 0.05
    settings = replace(small_inj, out=tmp_path, component=component, ratios=(ratio,), methods=("activations", "random"))
    run(settings)
    model = load_model(settings.model, device="cpu")
    text = load_definitions(model, settings.data)[1]
    record, made = (
        next(r for r in records_of(tmp_path) if (r["sequence"], r["method"]) == (text.id, method))
        for method in ("activations", INJECTION)
    )
    with inject(
        model, text, ratio, seed=1, lr=settings.lr, max_steps=20, target_loss=1.0, component=component
    ) as injected:
        scores = Activations(component=component)(model, text)
        norms = torch.stack([block.mlp.W_out.detach() for block in model.blocks])
    norms = norms.norm(dim=2) if component == "neuron" else norms.abs()
    gold = injected.ground_truth.members
    kept = load_file(tmp_path / "scores" / f"activations-{ratio:g}-00001.safetensors")
    assert torch.equal(kept["scores"], scores)
    assert torch.equal(kept["gold"], gold)
    for share in (ratio, 2 * ratio, 5 * ratio):
        taken = round(share * scores[0].numel())
        found = sum(
            len(set(layer.flatten().topk(taken).indices.tolist()) & set(members.flatten().nonzero().flatten().tolist()))
            for layer, members in zip(scores, gold, strict=True)
        )
        assert record[f"recall@{share:g}"] == pytest.approx(100 * found / gold.sum().item(), abs=1e-4)
        chosen = top_components(scores, share, rounding="nearest", component=COMPONENTS[component])
        by_hand = 100 * len(chosen & injected.ground_truth) / len(injected.ground_truth)
        assert record[f"recall@{share:g}"] == pytest.approx(by_hand, abs=1e-4)
    together = scores.flatten().topk(round(ratio * scores.numel())).indices
    assert record[f"recall_global@{ratio:g}"] == pytest.approx(
        100 * gold.flatten()[together].sum().item() / gold.sum().item(), abs=1e-4
    )

    def auroc(values):
        above = torch.searchsorted(values[~gold].sort().values, values[gold])
        below_or_equal = torch.searchsorted(values[~gold].sort().values, values[gold], right=True)
        return (above + below_or_equal).double().mean().item() / 2 / (~gold).sum().item()

    assert record["auroc"] == pytest.approx(auroc(scores), abs=1e-6)
    assert record["auroc_net"] == pytest.approx(auroc(scores) - auroc(norms), abs=2e-6)
    assert made["steps"] == injected.steps
    assert made[f"{component}s"] == gold.sum().item()
    assert made["auroc_weight_norm"] == pytest.approx(auroc(norms), abs=1e-6)
    assert made["auroc_norm_change"] == pytest.approx(auroc(injected.norm_change), abs=1e-6)


def test_the_gold_itself_reaches_the_ceiling_and_nothing_is_above(embedded):
    for seed in range(5):
        with inject(embedded, load_definitions(embedded)[0], 0.01, seed=seed, max_steps=1) as injected:
            gold = injected.neurons
        metrics = score_metrics(gold.members.float(), gold, 0.01)
        assert metrics["recall@0.01"] == metrics["recall_ceiling"] < 100
        assert metrics["recall_of_ceiling"] == metrics["recall@1"] == metrics["recall_global@0.01"] == 100
        assert metrics["auroc"] == metrics["average_precision"] == 1
        curve = {float(name[len("recall@") :]): value for name, value in metrics.items() if name.startswith("recall@")}
        assert [curve[share] for share in sorted(curve)] == sorted(curve.values())


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


def test_shares_that_take_nothing_or_more_than_all_are_left_out():
    gold = Neurons(torch.arange(40).view(2, 20) % 3 == 0)
    measured = score_metrics(torch.rand(2, 20), gold, 0.4)
    shares = {float(name.removeprefix("recall@")) for name in measured if name.startswith("recall@")}
    assert shares == {0.05, 0.1, 0.2, 0.4, 0.5, 0.8, 1.0}  # 1/40 is half a neuron, and 5 * 0.4 is above 1
    for times in TIMES:
        assert (f"recall@{times * 0.4:g}" in measured) == (times * 0.4 <= 1)


def test_a_killed_run_goes_on_to_the_same_records(whole_inj, small_inj, tmp_path, dies_after):
    settings = replace(small_inj, out=tmp_path)
    for count in (1, 4, 9, 10):
        dies_after(count)
        with pytest.raises(Killed):
            run(settings)
    dies_after(0)
    run(settings)
    assert records_of(tmp_path) == records_of(whole_inj.out)
    assert (tmp_path / "summary.json").read_text() == (whole_inj.out / "summary.json").read_text()


def test_a_finished_run_injects_nothing(whole_inj):
    before = (whole_inj.out / "records.jsonl").read_bytes()
    summary = summary_of(whole_inj)
    assert run(whole_inj, engines.forbidden) == summary
    assert (whole_inj.out / "records.jsonl").read_bytes() == before


@dataclass(frozen=True)
class Mine:
    name = "mine"
    strength: float = 1.0

    def __call__(self, model, sequences):
        return self.strength * WeightNorm()(model, sequences)


def test_methods_and_ratios_are_added_to_an_old_run(small_inj, tmp_path):
    holds, too_few = small_inj.ratios
    settings = replace(small_inj, out=tmp_path, methods=("random",), ratios=(holds,))
    run(settings)
    records = tmp_path / "records.jsonl"

    def goes_on(settings: InjectionSettings, new: list[tuple]) -> None:
        old = records.read_bytes()
        summary, known = run(settings), len(old.splitlines())
        assert records.read_bytes().startswith(old)
        assert sorted(keys_of(records_of(tmp_path)[known:])) == sorted(new)
        assert summary == summary_of(settings)

    extended = replace(settings, methods=("random", Mine()))
    goes_on(extended, [(text, "mine", holds) for text in texts_of(settings)])
    with_ratio = replace(extended, ratios=(0.4, too_few))
    made = [(text, method, 0.4) for text in texts_of(settings) for method in (INJECTION, "random", "mine")]
    goes_on(with_ratio, made + [(text, INJECTION, too_few) for text in texts_of(settings)])
    assert list(summary_of(settings)["injections"]) == ["0.01", "0.2", "0.4"]
    with pytest.raises(ValueError, match=r"mine\.strength is 1\.0 there and 2\.0 here"):
        run(replace(settings, methods=(Mine(2.0),)))
    assert run(replace(extended, out=tmp_path / "fresh", ratios=(holds, 0.4, too_few))) == summary_of(settings)


@pytest.mark.parametrize(
    ("component", "of_embedded", "of_others"),
    [
        ("neuron", {0.01: 46, 0.05: 230}, {0.001: 2, 0.01: 20}),
        ("weight", {0.01: 8847, 0.05: 44237}, {0.001: 80, 0.01: 800}),
    ],
)
def test_default_ratios_follow_the_model(small_inj, wide, tmp_path, component, of_embedded, of_others):
    """The ratios, and how many components they are: of 6 layers of 768 neurons, and of 2 of 1000."""
    quick = dict(component=component, methods=("random",), limit=1, max_steps=1, device="cpu")
    embedded = InjectionSettings(out=tmp_path / "embedded", **quick)
    other = InjectionSettings(out=tmp_path / "other", model=str(wide), data=small_inj.data, **quick)
    for settings, expected in ((embedded, of_embedded), (other, of_others)):
        assert list(run(settings)["injections"]) == [str(ratio) for ratio in expected]
        assert {made["ratio"]: made[f"{component}s"] for made in records_of(settings.out)} == expected


@pytest.mark.slow
def test_kept_norms_leave_no_leak(tmp_path):
    settings = InjectionSettings(
        ratios=(0.05,), keep_norms=True, methods=("weight-norm",), limit=3, max_steps=60, out=tmp_path, device="cpu"
    )
    summary = run(settings)
    assert summary["injections"]["0.05"]["succeeded"] == settings.limit
    assert 0.4 < summary["injections"]["0.05"]["auroc_weight_norm"]["mean"] < 0.6
    assert {record["sequence"] for record in records_of(tmp_path)} == {f"definition-{n:02d}" for n in (6, 7, 8)}


def test_tuning_chooses_from_the_dev_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "GRIDS", {"slimming": {"lr": (1e-3, 0.1), "penalty_each": (0.02,)}})
    settings = InjectionSettings(
        ratios=(0.05,),
        max_steps=60,
        target_loss=1.0,
        device="cpu",
        tune=True,
        methods=(Slimming(steps=10), "random"),
        out=tmp_path,
    )
    summary = run(settings)
    means = {name: cells["0.05"]["recall_of_ceiling"]["mean"] for name, cells in summary["tried"].items()}
    penalty = f"{0.02 * 6 * 768:.2g}"
    assert list(means) == [f"slimming lr={lr} penalty={penalty}" for lr in ("0.001", "0.1")]
    assert summary["chosen"] == {"slimming": max(means, key=means.__getitem__)}
    records = records_of(tmp_path / "tuning")
    assert {record["sequence"] for record in records} == {f"definition-0{index}" for index in range(1, 6)}
    for name, mean in means.items():
        values = [record["recall_of_ceiling"] for record in records if record["method"] == name]
        assert mean == pytest.approx(fmean(values))
    assert run(settings, engines.forbidden) == summary
    show(settings, summary)
    assert f"chosen settings: {tmp_path / 'tuning' / 'tuned.toml'}" in capsys.readouterr().out.replace("\n", " ")

    arguments = ["--config", str(tmp_path / "tuning" / "tuned.toml"), "--limit", "3"]
    chosen = parse(InjectionSettings, "command", None, arguments)
    slimming = next(localizer for localizer in chosen.methods if name_of(localizer) == "slimming")
    assert chosen.limit == 3
    assert f"slimming lr={slimming.lr:g} penalty={slimming.penalty:g}" == summary["chosen"]["slimming"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": (1.0,)}, r"the ratio is 1\.0; it must be a number above 0 and below 1"),
        ({"ratios": (0.0,)}, "above 0 and at most 1"),
        ({"lr": -1.0}, r"lr is -1\.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"target_loss": 0.0}, r"target_loss is 0\.0"),
        ({"limit": -1}, "limit is -1"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 2.5}, r"max_tokens is 2\.5; it must be a whole number"),
        ({"component": "head", "methods": ()}, "component is 'head'; INJ writes texts into weights of W_out"),
        ({"component": "weight", "methods": (), "keep_norms": True}, "keep_norms keeps the lengths of rows"),
        ({"tune": True, "methods": ("random",)}, "tune chooses settings of hard-concrete and slimming"),
        ({"methods": ("random", "random")}, "name each once"),
    ],
)
def test_bad_settings_are_refused_on_construction(small_inj, change, message):
    settings = replace(small_inj)
    for name, value in change.items():
        object.__setattr__(settings, name, value)  # past the type checker of the suite, which users do not have
    with pytest.raises(ValueError, match=message):
        settings.__post_init__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": (0.0001,)}, "takes none of 384 neurons"),
        ({"ratios": (0.003,)}, "takes none of 128 neurons"),
        ({"data": "/nowhere.jsonl"}, "no texts at '/nowhere.jsonl'"),
        ({"data": None}, "no tokenizer to read texts with"),
        ({"memory": "1MiB"}, "taken by the model and Python already"),
        ({"methods": (lambda model, sequences: None,)}, "'<lambda>'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_long_work(small_inj, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(injection, "inject", None)
    with pytest.raises(ValueError, match=message):
        run(replace(small_inj, out=tmp_path / "run", **change))
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_the_table_of_a_run(whole_inj, capsys):
    show(whole_inj, summary_of(whole_inj))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"INJ on {whole_inj.model}, {whole_inj.limit} texts" in shown
    assert "20% of all neurons: 2 of 2 texts injected" in shown
    assert "1% of all neurons were too few for s0, s1" in shown
    assert all(method in shown for method in LOCALIZERS)
