"""Sequences by relation and category, and what each group loses, counted sequence by sequence."""

import io
import json

import pytest
import torch
from rich.console import Console

from conftest import PROMPT, make_recited
from memloc_lens import Gradient, MemorizedSequence, load_model, load_sequences
from memloc_lens.erase import Budget, Spared, choose
from memloc_lens.erase.erasing import reached
from memloc_lens.erase.relations import by_category, by_relation
from memloc_lens.erase.table import print_erasure


@pytest.fixture(scope="module")
def erasure(tmp_path_factory):
    """An erasure of a sequence of category c0, with a copy of it among the others, and what the others lose."""
    folder = make_recited(tmp_path_factory.mktemp("recited"))
    model = load_model(folder / "model", device="cpu", dtype=torch.float64)
    sequences = load_sequences(model, folder / "data.jsonl")
    copied = sequences[0].tokens.clone()
    copied[-1] = (copied[-1] + 1) % 50
    others = [*sequences[1:], MemorizedSequence(copied, PROMPT, "copy", "c1")]
    scores = Gradient()(model, sequences[:1])
    erasure = choose(model, sequences[:1], scores, Spared(others=others), Budget(1e9, 100))
    before = accuracies(model, others)
    for layer, neuron in erasure.components.indices():
        model.blocks[layer].mlp.W_out.data[neuron] = 0
    return erasure, others, before, accuracies(model, others)


@torch.no_grad()
def accuracies(model, sequences) -> dict[str, float]:
    right = {each.id: model(each.tokens[None])[0, PROMPT - 1 : -1].argmax(-1) == each.suffix for each in sequences}
    return {id: 100 * row.double().mean().item() for id, row in right.items()}


def test_each_group_loses_what_its_sequences_lose(erasure):
    found, others, before, after = erasure
    relations = {"near-duplicates": ["copy"], "related": ["s2", "s4"], "unrelated": ["s1", "s3", "s5"]}
    categories = {"c0": ["s2", "s4"], "c1": ["s1", "s3", "s5", "copy"]}
    for expected, losses in ((relations, found.losses.relations), (categories, found.losses.categories)):
        assert set(losses) == set(expected)
        for name, ids in expected.items():
            assert losses[name].sequences == len(ids)
            assert losses[name].before == pytest.approx(sum(before[id] for id in ids) / len(ids), abs=1e-4)
            assert losses[name].after == pytest.approx(sum(after[id] for id in ids) / len(ids), abs=1e-4)
    assert len({loss.before - loss.after for loss in found.losses.relations.values()}) > 1
    assert found.after.accuracy == pytest.approx(sum(after.values()) / len(others), abs=1e-4)  # the budget's rule


def test_they_are_told(erasure):
    found, _, before, after = erasure
    shown = io.StringIO()
    print_erasure(found, Console(file=shown, width=200))
    change = sum(after[id] - before[id] for id in ("s1", "s3", "s5")) / 3
    assert f"  unrelated: {change:+.2f} points, of 3 sequences\n" in shown.getvalue()
    assert shown.getvalue().index("near-duplicates: ") < shown.getvalue().index("related: ")
    told = json.loads(json.dumps(reached(found)))
    assert told["losses"]["relations"]["near-duplicates"]["sequences"] == 1
    assert told["losses"]["categories"]["c0"]["before"] == pytest.approx(100)
    assert set(told["before"]) == set(told["steps"][0]["utility"]) == {"perplexity", "accuracy"}


def test_groups_hold_every_sequence():
    targets = [MemorizedSequence(range(1, 20), 1, "t", "x")]
    rows = (
        (range(2, 21), ["x"]), (range(7, 33), []), (range(40, 60), ["y", "x", "y"]), (range(60, 80), ["y"]),
    )  # fmt: skip
    others = [MemorizedSequence(tokens, 1, str(place), category) for place, (tokens, category) in enumerate(rows)]

    def ids(groups):
        return {name: [each.id for each in group] for name, group in groups.items()}

    assert ids(by_relation(targets, others)) == {"near-duplicates": ["0", "1"], "related": ["2"], "unrelated": ["3"]}
    assert ids(by_category(others)) == {"x": ["0", "2"], "y": ["2", "3"]}
    assert by_relation(targets, []) == by_category([]) == {}
