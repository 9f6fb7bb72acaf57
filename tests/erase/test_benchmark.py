"""Ways of forgetting side by side, against models that are changed by hand and decoded a token at a time."""

import json
from dataclasses import replace

import pytest
import torch

from conftest import write_lines
from memloc_lens import NEURONS, WEIGHTS, ComponentSet, load_model, load_sequences
from memloc_lens.erase import benchmark, ways
from memloc_lens.erase.benchmark import ForgettingSettings, run, show
from memloc_lens.erase.forgetting import forgetting_table
from memloc_lens.erase.variants import VARIANTS
from memloc_lens.erase.ways import WAYS, Task, at_random, by_set, zeroed


@pytest.fixture
def small(recited, tmp_path) -> ForgettingSettings:
    return ForgettingSettings(
        model=str(recited / "model"),
        data=recited / "data.jsonl",
        limit=2,
        negatives=2,
        context_sequences=2,
        relearn=2,
        max_steps=2,
        until="greedy",
        out=tmp_path / "forgetting",
        device="cpu",
        quiet=True,
        ways=("iterative-neurons", "random-neurons"),
    )


@pytest.fixture
def task(recited, tmp_path) -> Task:
    model = load_model(recited / "model", device="cpu")
    sequences = load_sequences(model, recited / "data.jsonl")
    return Task(model, sequences[:2], sequences[4:], tmp_path)


def naive_extracted(model, sequence) -> bool:
    """Whether four tokens of the suffix are written in one piece by any prompt, a token at a time."""
    for vary in VARIANTS.values():
        asked = vary(model, sequence) or sequence
        tokens = asked.prompt
        for _ in asked.suffix:
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
        written = tokens[0, asked.prompt_len :].tolist()
        suffix = asked.suffix.tolist()
        pieces = [suffix[start : start + 4] for start in range(len(suffix) - 3)]
        if any(written[start : start + 4] in pieces for start in range(len(written))):
            return True
    return False


@torch.no_grad()
@pytest.mark.parametrize("name", ["iterative-weights", "iterative-neurons", "gradient-ascent", "npo"])
def test_the_model_has_forgotten_and_comes_back(task, name):
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    assert all(naive_extracted(task.model, target) for target in task.targets)
    with WAYS[name](task) as forgotten:
        assert forgotten.model is task.model
        assert not any(naive_extracted(task.model, target) for target in task.targets)
        changed = {key for key, value in task.model.state_dict().items() if not torch.equal(value, before[key])}
    if "iterative" in name:
        assert changed <= {"blocks.1.mlp.W_out", "blocks.2.mlp.W_out"}  # the first layer is left alone
    else:
        assert len(changed) > 10
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())


@pytest.mark.parametrize("component", [NEURONS, WEIGHTS], ids=["neurons", "weights"])
def test_zeroed_weights_are_zero_and_no_others(task, component):
    draw = torch.Generator().manual_seed(0)
    members = torch.rand(component.shape(task.model), generator=draw) < 0.3
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    with zeroed(task.model, ComponentSet(members, component)):
        for layer, block in enumerate(task.model.blocks):
            expected = before[f"blocks.{layer}.mlp.W_out"].clone()
            for index in members[layer].nonzero().tolist():
                expected[tuple(index)] = 0
            assert torch.equal(block.mlp.W_out, expected)
    assert torch.equal(task.model.blocks[0].mlp.W_out, before["blocks.0.mlp.W_out"])


def test_random_neurons_are_as_many_in_every_layer(task):
    with by_set(task, ways.ITERATIVE, "neuron") as forgotten:
        located = [(block.mlp.W_out == 0).all(dim=1) for block in task.model.blocks]
    assert forgotten.what == f"{sum(int(each.sum()) for each in located)} neurons"
    with at_random(task) as drawn:
        at = [(block.mlp.W_out == 0).all(dim=1) for block in task.model.blocks]
    assert [int(each.sum()) for each in at] == [int(each.sum()) for each in located]
    assert drawn.what == forgotten.what
    assert not all(map(torch.equal, at, located))


def test_rows_are_those_of_the_changed_models(small, recited, capsys):
    settings = replace(small, ways=("iterative-neurons", "retrained"), retrained=str(recited / "model"))
    found = run(settings)
    assert json.loads((settings.out / "summary.json").read_text()) == found
    assert found["sequences"] == ["s0", "s1"]
    same = found["ways"]["retrained"]  # it is the original, so that nothing is forgotten or lost
    assert same["extracted"] == found["before"]["extracted"] == 2
    assert same["accuracy"] == found["before"]["accuracy"] == 100
    assert same["left"]["prefix"]["mean"] == 8
    assert found["ways"]["iterative-neurons"]["extracted"] == 0
    assert set(same["relearned"]["new"]) == {"s6", "s7"}
    assert [len(each["curve"]) for each in same["relearned"]["erased"].values()] == [1, 1]  # back without a step
    show(settings, found)
    assert "iter" in capsys.readouterr().out


def test_rows_that_were_measured_are_read_again(small, monkeypatch):
    first = run(small)
    with monkeypatch.context() as patched:
        patched.setattr(benchmark, "WAYS", dict.fromkeys(WAYS))
        assert run(small)["ways"] == first["ways"]
        for change in (dict(limit=1, relearn=1), dict(max_steps=1), dict(negatives=1), dict(until="accuracy")):
            with pytest.raises(TypeError, match="not callable"):
                run(replace(small, **change))


def test_the_table_has_the_figures_of_the_rows(small):
    found = run(small)
    for line, (way, row) in zip(forgetting_table(found).splitlines()[2:], found["ways"].items(), strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:3] == [way, row["what"], str(row["extracted"])]
        assert float(cells[3]) == pytest.approx(row["left"]["accuracy"]["mean"], abs=0.05)
        assert float(cells[6]) == pytest.approx(row["accuracy"] - found["before"]["accuracy"], abs=0.005)
        steps = sorted(99 if each["steps"] is None else each["steps"] for each in row["relearned"]["erased"].values())
        assert cells[8] == (f"{max(steps[0], 1)}" if steps[0] < 99 else "over 2")


def test_what_cannot_be_used(small, recited, tmp_path):
    few = write_lines(tmp_path / "few.jsonl", [{"tokens": list(range(14)), "prompt_len": 6, "id": "few"}])
    for changes, words in (
        (dict(controls=few), "2 sequences are relearned, and there are 1 texts"),
        (dict(context_sequences=0), "give --context"),
        (dict(retrained=str(tmp_path / "nowhere")), "nowhere"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            run(replace(small, ways=("npo",), **changes))
    for changes, words in (
        (dict(ways=("magic",)), "the way is 'magic'"),
        (dict(ways=("retrained",)), "give it as --retrained"),
        (dict(relearn=0), "relearn is 0"),
        (dict(lr=0.0), "lr is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(small, **changes)
