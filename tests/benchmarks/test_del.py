import json
import shutil
from dataclasses import dataclass, replace
from statistics import fmean

import engines
import pytest
import torch
from safetensors.torch import load_file

from conftest import QUICK, Killed, keys_of, records_of, write_lines
from memloc_lens import COMPONENTS, LOCALIZERS, Activations, Neurons, Random, WeightNorm, load_model
from memloc_lens.benchmarks import deletion, measurement
from memloc_lens.benchmarks.deletion import DeletionSettings, run, show
from memloc_lens.benchmarks.measurement import METRICS, Metric
from memloc_lens.components import top_components
from memloc_lens.data import load_sequences
from memloc_lens.metrics import free_running, suffix_accuracy, teacher_forced, text_distance
from memloc_lens.models import EMBEDDED
from memloc_lens.runs.methods import configured, name_of
from memloc_lens.runs.schema import BEFORE


def summary_of(settings: DeletionSettings) -> dict:
    return json.loads((settings.out / "summary.json").read_text())


def methods_of(settings: DeletionSettings) -> list[str]:
    return [name_of(localizer) for localizer in settings.localizers()]


def test_one_record_for_each_sequence_method_and_ratio(whole_del):
    records, targets = records_of(whole_del.out), [f"s{index}" for index in range(whole_del.limit)]
    wanted = [(target, BEFORE, 0.0) for target in targets]
    wanted += [(t, method, ratio) for t in targets for method in LOCALIZERS for ratio in whole_del.ratios]
    assert sorted(keys_of(records)) == sorted(wanted)
    assert len(whole_del.methods) == len(LOCALIZERS)
    layers = 2  # the model's but the first
    for record in records:
        assert record["method"] == BEFORE or record["neurons"] == layers * int(record["ratio"] * 128)


def test_the_summary_is_of_the_records(whole_del):
    summary = summary_of(whole_del)
    assert list(summary["methods"]) == methods_of(whole_del)
    records = records_of(whole_del.out)
    for method in methods_of(whole_del):
        for ratio in whole_del.ratios:
            cells = summary["methods"][method][str(ratio)]
            for metric in ("self_acc", "self_free_acc", "neg_acc", "neg_related_acc", "control_acc"):
                values = [r[metric] for r in records if (r["method"], r["ratio"]) == (method, ratio)]
                assert cells[metric]["mean"] == pytest.approx(fmean(values))
                assert cells[metric]["n"] == len(values) == whole_del.limit
    before = [record for record in records if record["method"] == BEFORE]
    assert summary["before"]["control_acc"]["mean"] == pytest.approx(fmean(r["control_acc"] for r in before))
    assert summary["before"]["self_acc"]["mean"] == summary["before"]["self_free_acc"]["mean"] == 100
    assert all(record["self_acc"] <= 0 for record in records if record["method"] != BEFORE)
    assert min(record["self_acc"] for record in records if record["method"] != BEFORE) < -50


WRITES_WITH = {
    "neuron": lambda block: block.mlp.W_out,  # [neuron, d_model]
    "head": lambda block: block.attn.W_O,  # [head, d_head, d_model]
    "weight": lambda block: block.mlp.W_out,
}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_record_is_what_its_parts_say(small_del, tmp_path, component, scope):
    """Records again by hand, with the weights that the components write with zeroed in place of the ablation."""
    localizer = Activations(component=component)
    ratios = (0.25, 0.5) if component == "head" else small_del.ratios
    settings = replace(
        small_del, out=tmp_path, methods=("activations",), limit=2, component=component, scope=scope, ratios=ratios
    )
    run(settings)
    records = {(record["sequence"], record["ratio"]): record for record in records_of(tmp_path)}
    clean = load_model(settings.model, device="cpu")
    sequences, controls = load_sequences(clean, settings.data), load_sequences(clean, settings.data, split="control")
    target, others = sequences[1], [sequences[index] for index in (0, 2, 3, 4, 5)]

    def accuracies(model) -> dict[str, float]:
        groups = {
            "self": [target],
            "neg": others,
            "neg_related": [other for other in others if other.category == target.category],
            "neg_unrelated": [other for other in others if other.category != target.category],
            "control": controls,
        }
        values = {
            f"{name}_acc": suffix_accuracy(teacher_forced(model, group), group).mean().item()
            for name, group in groups.items()
        }
        return values | {"self_free_acc": suffix_accuracy(free_running(model, [target]), [target]).item()}

    def check_sample(model, record) -> None:
        with torch.no_grad():
            probabilities = model(target.tokens[None])[0].softmax(dim=-1)
        expected = probabilities[target.prompt_len - 1 : -1].gather(1, target.suffix[:, None])[:, 0]
        assert record["probabilities"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert record["written"] == free_running(model, [target])[0].tolist()

    before = accuracies(clean)
    for name, value in before.items():
        assert records["s1", 0.0][name] == pytest.approx(value, abs=1e-4)
    check_sample(clean, records["s1", 0.0])
    changes = []
    for ratio in settings.ratios:
        kind = COMPONENTS[component]
        chosen = top_components(localizer(clean, target), ratio, first_layer=1, scope=scope, component=kind)
        assert records["s1", ratio][kind.plural] == len(chosen)
        model = load_model(settings.model, device="cpu")
        for block, members in zip(model.blocks, chosen.members, strict=True):
            WRITES_WITH[component](block).data[members] = 0
        for name, after in accuracies(model).items():
            assert records["s1", ratio][name] == pytest.approx(after - before[name], abs=1e-4)
            changes.append(after - before[name])
        check_sample(model, records["s1", ratio])
        each = {other.id: suffix_accuracy(teacher_forced(model, [other]), [other]).item() for other in sequences}
        assert records["s1", ratio]["acc_changes"] == pytest.approx(
            {id: accuracy - records["s1", 0.0]["accuracies"][id] for id, accuracy in each.items()}, abs=1e-3
        )
    assert min(changes) < -10


def test_a_killed_run_goes_on_to_the_same_records(whole_del, small_del, tmp_path, dies_after):
    settings = replace(small_del, out=tmp_path)
    for count in (2, 8, 33):
        dies_after(count)
        with pytest.raises(Killed):
            run(settings)
    dies_after(0)
    run(settings)
    assert records_of(tmp_path) == records_of(whole_del.out)
    assert (tmp_path / "summary.json").read_text() == (whole_del.out / "summary.json").read_text()


def test_the_state_before_is_measured_once(whole_del, small_del, tmp_path, dies_after, monkeypatch):
    settings = replace(small_del, out=tmp_path, methods=("random",))
    dies_after(small_del.limit)
    with pytest.raises(Killed):
        run(settings)
    assert {method for _, method, _ in keys_of(records_of(tmp_path))} == {BEFORE}
    dies_after(0)
    monkeypatch.setattr(deletion, "_before", None)
    run(settings)
    of_whole = [record for record in records_of(whole_del.out) if record["method"] in (BEFORE, "random")]
    assert records_of(tmp_path) == of_whole


def test_a_finished_run_does_nothing(whole_del):
    before = (whole_del.out / "records.jsonl").read_bytes()
    summary = summary_of(whole_del)
    assert run(whole_del, engines.forbidden) == summary
    assert (whole_del.out / "records.jsonl").read_bytes() == before


@dataclass(frozen=True)
class Mine:
    name = "mine"
    strength: float = 1.0

    def __call__(self, model, sequences):
        return self.strength * WeightNorm()(model, sequences)


def plain(model, sequences):
    return Activations()(model, sequences)


def test_methods_and_ratios_are_added_to_an_old_run(small_del, tmp_path, monkeypatch):
    settings = replace(small_del, out=tmp_path, methods=("random",), ratios=(0.5,))
    run(settings)
    records = tmp_path / "records.jsonl"
    monkeypatch.setattr(deletion, "_before", None)  # nothing is measured again

    def goes_on(settings: DeletionSettings, new: list[tuple]) -> None:
        old = records.read_bytes()
        summary, known = run(settings), len(old.splitlines())
        assert records.read_bytes().startswith(old)
        assert sorted(keys_of(records_of(tmp_path)[known:])) == sorted(new)
        assert summary == summary_of(settings)

    targets = [f"s{index}" for index in range(small_del.limit)]
    extended = replace(settings, methods=("random", Mine()))
    goes_on(extended, [(target, "mine", 0.5) for target in targets])
    with_ratio = replace(extended, ratios=(0.5, 0.1))
    goes_on(with_ratio, [(target, method, 0.1) for target in targets for method in ("random", "mine")])
    alone = replace(with_ratio, methods=(plain,))
    goes_on(alone, [(target, "plain", ratio) for target in targets for ratio in (0.1, 0.5)])
    assert list(summary_of(alone)["methods"]) == ["random", "mine", "plain"]
    assert list(summary_of(alone)["methods"]["mine"]) == ["0.1", "0.5"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["methods"]["mine"] == {"callable": f"{__name__}:Mine", "strength": 1.0}
    assert config["ratios"] == [0.1, 0.5]
    with pytest.raises(ValueError, match=r"mine\.strength is 1\.0 there and 2\.0 here"):
        run(replace(settings, methods=(Mine(2.0),)))
    fresh = replace(with_ratio, out=tmp_path / "fresh", methods=("random", Mine(), plain), ratios=(0.1, 0.5))
    monkeypatch.undo()
    assert run(fresh) == summary_of(alone)


def test_a_new_method_of_the_package_joins_an_old_run(whole_del, tmp_path, monkeypatch):
    shutil.copytree(whole_del.out, tmp_path / "run")
    old = (tmp_path / "run" / "records.jsonl").read_bytes()
    settings = replace(whole_del, out=tmp_path / "run")
    monkeypatch.setitem(LOCALIZERS, "mine", Mine)
    assert methods_of(replace(settings, methods=())) == list(LOCALIZERS)
    summary = run(replace(settings, methods=(*QUICK, "mine")))
    assert (tmp_path / "run" / "records.jsonl").read_bytes().startswith(old)
    assert {record["method"] for record in records_of(tmp_path / "run")[len(old.splitlines()) :]} == {"mine"}
    assert list(summary["methods"]) == list(LOCALIZERS)


def test_the_configuration_has_the_methods_that_run(whole_del, small_del, tmp_path):
    run(replace(small_del, out=tmp_path, methods=("random", Activations("mean_abs")), limit=1, ratios=(0.5,)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["methods"] == {
        "random": {"callable": "memloc_lens.localizers.baselines:Random", "seed": 0, "component": "neuron"},
        "activations": {
            "callable": "memloc_lens.localizers.activations:Activations",
            "reduction": "mean_abs",
            "component": "neuron",
        },
    }
    assert config["written_by"][0].keys() >= {"memloc_lens", "source_sha256", "command", "machine"}
    assert (config["component"], config["first_layer"], config["data"]) == ("neuron", 1, str(small_del.data))
    whole = json.loads((whole_del.out / "config.json").read_text())
    assert whole["methods"]["zero-out"]["first_layer"] == whole_del.first_layer == 1


def test_a_new_metric_is_one_entry(small_del, tmp_path, monkeypatch, capsys):
    settings = replace(small_del, out=tmp_path / "new", methods=("random",), ratios=(0.5,))
    old = replace(settings, out=tmp_path / "old")
    run(old)

    def worst(state, target):
        return min(match.acc for match in state.negatives(target))

    metrics = (*METRICS, Metric("neg_worst", "Worst", "points", 1, "+.3f", worst))
    for module in (deletion, measurement):
        monkeypatch.setattr(module, "METRICS", metrics)
    summary = run(settings)
    records = records_of(settings.out)
    of_before = {record["sequence"]: record["accuracies"] for record in records if record["method"] == BEFORE}
    expected = []
    for record in [record for record in records if record["method"] == "random"]:
        before = {id: acc for id, acc in of_before[record["sequence"]].items() if id != record["sequence"]}
        after = {id: acc + record["acc_changes"][id] for id, acc in before.items()}
        expected.append(min(after.values()) - min(before.values()))
        assert record["neg_worst"] == pytest.approx(expected[-1], abs=1e-3)
    assert summary["methods"]["random"]["0.5"]["neg_worst"]["mean"] == pytest.approx(fmean(expected), abs=1e-3)
    show(settings, summary)
    shown = capsys.readouterr().out
    assert "Worst" in shown
    assert f"{fmean(expected):+.3f}*" in shown
    # a run that began without it goes on without it
    summary = run(replace(old, methods=("random", "weight-norm")))
    assert "neg_worst" not in summary["methods"]["weight-norm"]["0.5"]
    show(old, summary)


def test_metrics_of_a_model_with_a_tokenizer(tmp_path, embedded):
    settings = DeletionSettings(
        methods=("activations",), ratios=(0.1,), limit=1, negatives=9, controls=3, text_tokens=256, out=tmp_path,
        device="cpu",
    )  # fmt: skip
    summary = run(settings)
    assert set(summary["methods"]["activations"]["0.1"]) == {metric.name for metric in METRICS}
    assert summary["text"]["tokens"] == 256
    assert summary["text"]["low"] < summary["text"]["mean"] < summary["text"]["high"]
    before = summary["before"]
    assert summary["text"]["mean"] == pytest.approx(before["ppl"]["mean"], rel=1e-5)
    target = load_sequences(embedded)[:1]
    assert before["self_acc"]["mean"] == pytest.approx(suffix_accuracy(teacher_forced(embedded, target), target).item())
    expected = text_distance(embedded, free_running(embedded, target), target).item()
    assert before["self_free_dist"]["mean"] == pytest.approx(expected)


@pytest.mark.slow
def test_other_ablations_do_less_damage(tmp_path):
    settings = DeletionSettings(
        methods=("activations",), ratios=(0.5,), limit=1, negatives=1, controls=1, text_tokens=128, device="cpu"
    )
    rises = {}
    for ablation in ("zero", "mean", "scale"):
        summary = run(replace(settings, out=tmp_path / ablation, ablation=ablation))
        rises[ablation] = summary["methods"]["activations"]["0.5"]["ppl"]["mean"]
    assert 0 < rises["mean"] < rises["zero"]
    assert 0 < rises["scale"] < rises["zero"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("nonsense",)}, "no method is called 'nonsense'; there are hard-concrete"),
        ({"methods": ("random", "random")}, "methods are random random; name each once"),
        ({"methods": ("random", Random(seed=1))}, "methods are random random; name each once"),
        ({"methods": (Random,)}, "is not a localizer; give an instance"),
        ({"component": "wing"}, "component is 'wing'; it must be one of 'neuron', 'head', 'weight'"),
        ({"component": "head", "methods": ("integrated-gradients",)}, "scores neurons only, not heads"),
        ({"component": "weight", "ablation": "mean", "methods": ()}, "single weights have no activations"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of 'float32'"),
        ({"device": "banana"}, "device is 'banana'"),
        ({"ratios": (0.0,)}, "above 0 and at most 1"),
        ({"ratios": (1.5,)}, "above 0 and at most 1"),
        ({"ratios": ("all",)}, "the ratio is 'all'; it must be a number"),
        ({"ratios": (0.1, 0.1)}, "name each once"),
        ({"limit": -1}, "limit is -1"),
        ({"limit": 1.5}, r"limit is 1\.5; it must be a whole number"),
        ({"seed": 1.5}, r"seed is 1\.5; it must be a whole number"),
        ({"negatives": -1}, "negatives is -1"),
        ({"controls": "some"}, "controls is 'some'; it must be a whole number at least 0"),
        ({"batch": 0}, "batch is 0"),
        ({"text_tokens": 0}, "text_tokens is 0"),
        ({"first_layer": -1}, "first_layer is -1"),
        ({"scope": "model"}, "scope is 'model'; it must be one of 'layer', 'global'"),
        ({"ablation": "one"}, "ablation is 'one'; it must be one of 'zero', 'mean', 'scale'"),
        ({"memory": "lots"}, "memory is 'lots'; write an amount"),
    ],
)
def test_bad_settings_are_refused_on_construction(small_del, change, message):
    settings = replace(small_del)
    for name, value in change.items():
        object.__setattr__(settings, name, value)  # past the type checker of the suite, which users do not have
    with pytest.raises(ValueError, match=message):
        settings.__post_init__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": (0.001,)}, "takes none of 128 neurons"),
        ({"ratios": (0.2,), "component": "head", "methods": ()}, "takes none of 4 heads"),
        ({"ratios": (0.0001,), "component": "weight", "methods": ()}, "takes none of 4096 weights"),
        ({"memory": "1MiB"}, "taken by the model and Python already"),
        ({"first_layer": 3}, "has layers 0 to 2"),
        ({"ablation": "mean"}, "no tokenizer"),
        ({"text": EMBEDDED / "held_out.jsonl"}, "no tokenizer"),
        ({"model": "/nowhere"}, "no model at '/nowhere'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_long_work(small_del, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(replace(small_del, out=tmp_path / "run", **change), engines.forbidden)
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_a_data_file_is_refused_by_line(small_del, tmp_path):
    rows = [{"tokens": [1, 2], "prompt_len": 1}, {"tokens": [1, 2], "prompt_len": 2}]
    data = write_lines(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2"):
        run(replace(small_del, data=data, out=tmp_path / "run"))


def test_ids_must_differ(small_del, tmp_path):
    row = {"tokens": [1, 2], "prompt_len": 1, "id": "a"}
    data = write_lines(tmp_path / "same.jsonl", [row, row])
    with pytest.raises(ValueError, match=r"share an id|the id 'a'"):
        run(replace(small_del, data=data, out=tmp_path / "run"))


def test_changed_data_is_another_configuration(small_del, tmp_path):
    shutil.copy(small_del.data, tmp_path / "data.jsonl")
    settings = replace(small_del, data=tmp_path / "data.jsonl", out=tmp_path / "run", methods=("random",))
    run(settings)
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match=r"data_sha256 is .* sequence 1 is \['s0', .* there and \['s1', .* here"):
        run(settings)


def test_a_full_disk_is_seen_before_the_work(small_del, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"the run needs about .* free; choose another --out"):
        run(replace(small_del, out=tmp_path / "run"), engines.forbidden)


def test_scores_of_weights_need_the_room_that_they_take(small_del, tmp_path, monkeypatch):
    """A run that fits is not refused, and what was asked for is enough."""
    settings = replace(small_del, out=tmp_path, component="weight", methods=("random", "weight-norm"), limit=3)
    usage, scores = shutil.disk_usage(tmp_path), settings.limit * len(settings.methods) * 4 * 3 * 128 * 32
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=2 * scores))
    run(settings)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 2 * scores
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=scores // 2))
    with pytest.raises(ValueError, match="the run needs about"):
        run(replace(settings, out=tmp_path / "again"))


def test_neurons_of_a_run_can_be_had_again_from_its_scores(whole_del):
    model = load_model(whole_del.model, device="cpu")
    kept = load_file(whole_del.out / "scores" / "zero-out-00000.safetensors")["scores"]
    zero_out = configured(LOCALIZERS["zero-out"](), "neuron", first_layer=1)
    assert torch.equal(kept, zero_out(model, load_sequences(model, whole_del.data)[:2]))
    assert isinstance(deletion.located(whole_del, kept[0], 0.1), Neurons)


@pytest.mark.parametrize(
    ("component", "of_embedded", "of_others"),
    [
        ("neuron", {0.01: 7, 0.05: 38, 0.1: 76}, {0.001: 1, 0.005: 5}),
        ("head", {0.17: 1, 0.34: 2}, {0.1: 1, 0.2: 2}),
        ("weight", {0.001: 147, 0.01: 1474, 0.05: 7372}, {0.001: 40, 0.005: 200}),
    ],
)
def test_default_ratios_follow_the_model(small_del, wide, tmp_path, component, of_embedded, of_others):
    """The ratios, and how many components of a layer they are: of 768 neurons and of 1000, 6 heads and 10."""
    quick = dict(component=component, methods=("random",), limit=1, negatives=1, controls=1, device="cpu")
    embedded = DeletionSettings(out=tmp_path / "embedded", text_tokens=128, **quick)
    other = DeletionSettings(out=tmp_path / "other", model=str(wide), data=small_del.data, **quick)
    for settings, expected, layers in ((embedded, of_embedded, 5), (other, of_others, 1)):  # all but the first
        summary = run(settings)
        assert list(summary["methods"]["random"]) == [str(ratio) for ratio in expected]
        counts = {r["ratio"]: r[f"{component}s"] for r in records_of(settings.out) if r["method"] == "random"}
        assert counts == {ratio: layers * count for ratio, count in expected.items()}


def test_the_table_of_a_run(whole_del, capsys):
    show(whole_del, summary_of(whole_del))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"DEL on {whole_del.model}, 3 sequences" in shown
    assert "10% of each layer's neurons" in shown
    assert "50% of each layer's neurons" in shown
    assert f"records, scores and summary: {whole_del.out}" in shown
    assert all(method in shown for method in methods_of(whole_del))
