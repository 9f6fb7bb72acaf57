import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB, make_original

from memloc_lens import HardConcrete, IntegratedGradients, Neurons, Slimming, load_model, top_neurons
from memloc_lens.benchmarks.deletion import METRICS, Settings, run
from memloc_lens.data import load_sequences
from memloc_lens.metrics import free_running, suffix_accuracy, teacher_forced, text_distance
from memloc_lens.models import EMBEDDED


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Settings:
    """A run on a random model without a tokenizer, on sequences given as tokens."""
    path = tmp_path_factory.mktemp("small")
    make_original("gpt2").save_pretrained(path / "model")
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"tokens": torch.randint(VOCAB, (14,), generator=draw).tolist(), "prompt_len": 6, "id": f"s{place}",
         "category": [f"c{place % 2}"], "split": "control" if place > 5 else "test"}
        for place in range(8)
    ]  # fmt: skip
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Settings(
        model=str(path / "model"),
        data=path / "data.jsonl",
        ratios=(0.1, 0.5),
        limit=3,
        negatives=0,
        batch=2,
        device="cpu",
        hard_concrete=HardConcrete(steps=5),
        slimming=Slimming(steps=5),
        integrated_gradients=IntegratedGradients(steps=2),
    )


def records_of(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_seconds")} for line in lines]


def test_one_record_for_each_sequence_method_and_ratio(small, tmp_path):
    summary = run(replace(small, out=tmp_path))
    records = records_of(tmp_path)
    assert len(records) == 3 * 7 * 2
    assert len({(r["sequence"], r["method"], r["ratio"]) for r in records}) == len(records)
    assert all(r["neurons"] == 2 * int(r["ratio"] * 128) for r in records)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    of_random = [r["self_acc"] for r in records if r["method"] == "random" and r["ratio"] == 0.5]
    assert summary["methods"]["random"]["0.5"]["self_acc"]["mean"] == pytest.approx(sum(of_random) / 3)
    assert set(summary["methods"]) == set(small.methods)


def test_a_record_is_what_its_parts_say(small, tmp_path):
    """One record again by hand, with the rows of W_out zeroed in place of the ablation."""
    run(replace(small, out=tmp_path, methods=("activations",), limit=2))
    record = records_of(tmp_path)[3]
    assert (record["sequence"], record["ratio"]) == ("s1", 0.5)
    model = load_model(small.model, device="cpu")
    sequences, controls = load_sequences(model, small.data), load_sequences(model, small.data, split="control")
    target, others = sequences[1], [sequences[place] for place in (0, 2, 3, 4, 5)]
    neurons = top_neurons(small.localizer("activations")(model, target), 0.5, first_layer=1)

    def accuracies() -> dict[str, float]:
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

    before = accuracies()
    for block, members in zip(model.blocks, neurons.members, strict=True):
        block.mlp.W_out.data[members] = 0
    for name, after in accuracies().items():
        assert record[name] == pytest.approx(after - before[name], abs=1e-4)


def test_a_killed_run_goes_on_to_the_same_records(small, tmp_path, monkeypatch):
    run(replace(small, out=tmp_path / "whole"))
    from memloc_lens.benchmarks import records

    append = records.RunFolder.append
    for stop in (5, 17, 30):

        def append_or_die(self, record, stop=stop):
            append(self, record)
            if len(self.records) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(records.RunFolder, "append", append_or_die)
        with pytest.raises(KeyboardInterrupt):
            run(replace(small, out=tmp_path / "killed"))
    monkeypatch.setattr(records.RunFolder, "append", append)
    summary = run(replace(small, out=tmp_path / "killed"))
    assert records_of(tmp_path / "killed") == records_of(tmp_path / "whole")
    assert summary == json.loads((tmp_path / "whole" / "summary.json").read_text())


def test_a_finished_run_localizes_nothing(small, tmp_path, monkeypatch):
    summary = run(replace(small, out=tmp_path))
    monkeypatch.setattr(Settings, "localizer", None)
    assert run(replace(small, out=tmp_path)) == summary


def test_metrics_of_a_model_with_a_tokenizer(tmp_path, embedded):
    settings = Settings(methods=("activations",), ratios=(0.1,), limit=1, negatives=9, controls=3, text_tokens=256,
                        out=tmp_path, device="cpu")  # fmt: skip
    summary = run(settings)
    assert set(summary["methods"]["activations"]["0.1"]) == set(METRICS)
    assert summary["text"]["tokens"] == 256
    assert summary["text"]["low"] < summary["text"]["mean"] < summary["text"]["high"]
    before = summary["before"]
    assert summary["text"]["mean"] == pytest.approx(before["ppl"]["mean"], rel=1e-5)
    target = load_sequences(embedded)[:1]
    assert before["self_acc"]["mean"] == pytest.approx(suffix_accuracy(teacher_forced(embedded, target), target).item())
    expected = text_distance(embedded, free_running(embedded, target), target).item()
    assert before["self_free_dist"]["mean"] == pytest.approx(expected)


@pytest.mark.parametrize("ablation", ["mean", "scale"])
def test_other_ablations(tmp_path, ablation):
    settings = Settings(
        methods=("activations",), ratios=(0.5,), limit=1, negatives=3, controls=1, text_tokens=256, device="cpu"
    )
    zeroed = run(replace(settings, out=tmp_path / "zero"))
    other = run(replace(settings, out=tmp_path / ablation, ablation=ablation))
    assert (
        other["methods"]["activations"]["0.5"]["ppl"]["mean"] < zeroed["methods"]["activations"]["0.5"]["ppl"]["mean"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("nonsense",)}, "no method is called 'nonsense'; there are hard-concrete"),
        ({"methods": ("random", "random")}, "name each wanted one once"),
        ({"methods": ()}, "methods are none"),
        ({"ratios": (0.0,)}, "above 0 and at most 1"),
        ({"ratios": (1.5,)}, "above 0 and at most 1"),
        ({"ratios": (0.001,)}, "takes none of 128 neurons"),
        ({"ratios": (0.1, 0.1)}, "name each once"),
        ({"limit": -1}, "limit is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"memory": "lots"}, "memory is 'lots'; write an amount"),
        ({"memory": "1MiB"}, "taken by the model and Python already"),
        ({"first_layer": 3}, "has layers 0 to 2"),
        ({"ablation": "mean"}, "no tokenizer"),
    ],
)
def test_bad_settings_are_refused_before_long_work(small, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(Settings, "localizer", None)
    settings = replace(small, out=tmp_path / "run")
    for name, value in change.items():
        object.__setattr__(settings, name, value)  # past the type checker of the suite, which users do not have
    with pytest.raises(ValueError, match=message):
        run(settings)
    assert not (tmp_path / "run" / "records.jsonl").exists()


def test_a_data_file_is_refused_by_line(small, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"tokens": [1, 2], "prompt_len": 1}\n{"tokens": [1, 2], "prompt_len": 2}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2"):
        run(replace(small, data=tmp_path / "bad.jsonl", out=tmp_path / "run"))


def test_ids_must_differ(small, tmp_path):
    (tmp_path / "same.jsonl").write_text('{"tokens": [1, 2], "prompt_len": 1, "id": "a"}\n' * 2)
    with pytest.raises(ValueError, match="share an id"):
        run(replace(small, data=tmp_path / "same.jsonl", out=tmp_path / "run"))


def test_changed_data_is_another_configuration(small, tmp_path):
    shutil.copy(small.data, tmp_path / "data.jsonl")
    settings = replace(small, data=tmp_path / "data.jsonl", out=tmp_path / "run", methods=("random",))
    run(settings)
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="data_sha256 is"):
        run(settings)


def test_a_full_disk_is_seen_before_the_work(small, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(Settings, "localizer", None)
    with pytest.raises(ValueError, match="free"):
        run(replace(small, out=tmp_path / "run"))


def test_neurons_of_a_run_can_be_had_again_from_its_scores(small, tmp_path):
    from safetensors.torch import load_file

    run(replace(small, out=tmp_path, methods=("zero-out",)))
    model = load_model(small.model, device="cpu")
    kept = load_file(tmp_path / "scores" / "zero-out-00000.safetensors")["scores"]
    again = small.localizer("zero-out")(model, load_sequences(model, small.data)[:2])
    assert torch.equal(kept, again)
    assert isinstance(top_neurons(kept[0], 0.1, 1), Neurons)


def test_default_ratios_follow_the_model():
    assert Settings().model == EMBEDDED.name
