"""An audit against its parts on models whose weights are changed by hand, and its page."""

import copy
import json
import math
import re
from itertools import pairwise

import pytest
import torch
from tiny import tiny_model, tiny_sequence

from conftest import assert_same_state, state_of
from memloc_lens import MemorizedSequence
from memloc_lens.erase.audit import audit, write_audit
from memloc_lens.erase.relearning import Relearning, relearn
from memloc_lens.erase.state import Texts
from memloc_lens.metrics import perplexity, suffix_accuracy, teacher_forced

QUICK = Relearning(lr=0.02, max_steps=2)
HOSTILE = "t|a*b*\n<script>"


def named(sequence, id, category=()):
    return MemorizedSequence(sequence.tokens, sequence.prompt_len, id, category)


@pytest.fixture(scope="module")
def models():
    original = tiny_model()
    erased = copy.deepcopy(original)
    erased.blocks[1].mlp.W_out.data[:3] = 0
    return original, erased


@pytest.fixture(scope="module")
def material(models):
    """Two targets that the original recites, a near-duplicate of one, others of two categories, and controls."""
    targets = []
    for seed in (3, 4):
        tokens = tiny_sequence(seed, length=3, prompt_len=2).tokens
        for _ in range(7):
            tokens = torch.cat([tokens, models[0](tokens[None])[0, -1].argmax()[None]])
        targets.append(MemorizedSequence(tokens, 3, (HOSTILE, "t4")[seed - 3], ("one", "x|y")[seed - 3]))
    copied = targets[0].tokens.clone()
    copied[-1] = (copied[-1] + 1) % 31
    others = [
        MemorizedSequence(copied, 3, "copy", "one"),
        named(tiny_sequence(10), "related", "one"),
        named(tiny_sequence(11), "far", ["two", "three"]),
        named(tiny_sequence(12, length=9), "farther", "two"),
    ]
    controls = [named(tiny_sequence(seed), f"c{seed}", "one") for seed in (20, 21, 22)]
    text = torch.randint(31, (3, 12), generator=torch.Generator().manual_seed(5))
    return targets, others, controls, text


@pytest.fixture(scope="module")
def found(models, material):
    before = [state_of(model) for model in models]
    result = audit(*models, *material, relearning=QUICK, samples=50, share=0.4, retrained=models[0], quiet=True)
    for state, model in zip(before, models, strict=True):
        assert_same_state(state, state_of(model))
    return result


def test_groups(found):
    assert found["texts"] == {
        "targets": [HOSTILE, "t4"],
        "near-duplicates": ["copy"],
        "related": ["related"],
        "unrelated": ["far", "farther"],
        "controls": ["c20", "c21", "c22"],
    }


def test_extraction_before_and_after(found, models, material):
    targets = material[0]
    for when, model in zip(("before", "after"), models, strict=True):
        rights = []
        for target in targets:
            written = target.tokens[:3]
            for _ in target.suffix:
                written = torch.cat([written, model(written[None])[0, -1].argmax()[None]])
            right = int((written == target.tokens)[3:].long().cumprod(dim=0).sum())
            assert found["targets"][target.id]["own"][when]["prefix"] == right
            rights.append(right)
        cells = found["extraction"]["own"][when]
        assert cells["prefix"]["mean"] == pytest.approx(sum(rights) / 2)
        assert cells["recited"]["mean"] == 50 * rights.count(7)
    assert found["extraction"]["own"]["before"]["recited"]["mean"] == 100
    assert found["extraction"]["own"]["after"]["recited"]["mean"] < 100
    assert set(found["extraction"]) == {"own", "shifted", "later", "cut", "perturbed"}  # others need a tokenizer


def test_damage_is_that_of_the_metrics(found, models, material):
    _, others, controls, text = material
    first, then = (suffix_accuracy(teacher_forced(model, others + controls), others + controls) for model in models)
    change = (then - first).tolist()
    expected = {
        "near-duplicates": change[0],
        "related": change[1],
        "unrelated": sum(change[2:4]) / 2,
        "controls": sum(change[4:]) / 3,
    }
    groups = found["accuracy"]["groups"]
    assert {name: each["change"]["mean"] for name, each in groups.items()} == pytest.approx(expected, abs=1e-4)
    assert any(expected.values())
    by_category = {name: each["change"]["mean"] for name, each in found["accuracy"]["categories"].items()}
    categories = {"one": sum(change[:2]) / 2, "two": sum(change[2:4]) / 2, "three": change[2]}
    assert by_category == pytest.approx(categories, abs=1e-4)
    before, after = (perplexity(model, text) for model in models)
    assert found["perplexity"]["before"]["mean"] == pytest.approx(before)
    assert found["perplexity"]["change"]["mean"] == pytest.approx(100 * (after / before - 1))
    assert found["perplexity"]["change"]["low"] < found["perplexity"]["change"]["mean"]


def test_relearning_is_that_of_each_text(found, models, material):
    targets, others, controls, _ = material
    related = {"one": [others[1]], "x|y": []}  # not the near-duplicate
    for kind, model, sequences in (
        ("erased", models[1], targets),
        ("new", models[1], controls[:2]),
        ("retrained", models[0], targets),
    ):
        for sequence in sequences:
            expected = relearn(QUICK, model, sequence, related[sequence.category[0]])
            for lesson in ("itself", "half", "related"):
                of_kind = found["relearning"][lesson]["relearned"].get(kind, {})
                assert of_kind.get(sequence.id) == expected.get(lesson)
    assert set(found["relearning"]["itself"]["resurfacing"]) == {"new", "retrained"}


def test_it_is_written_and_reads_back(found, tmp_path):
    write_audit(tmp_path / "made", found)
    assert json.loads((tmp_path / "made" / "audit.json").read_text()) == found
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["AUDIT.md", "audit.json"]


def test_the_page(found, tmp_path):
    write_audit(tmp_path, found)
    page = (tmp_path / "AUDIT.md").read_text()
    parts = page.split("\n## ")
    assert [part.split("\n")[0] for part in parts[1:]] == [
        "Extraction of the targets", "Extraction of other sequences", "Relearning", "Membership", "Damage",
        "What was not tried",
    ]  # fmt: skip
    for part in parts[1:-1]:
        assert "\nMeasured: " in part
    assert parts[-1].count("\n- ") == len(found["not_tried"]) > 5
    assert "<script>" not in page
    assert "a*b*" not in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    for line, following in pairwise(tables):
        if "---" in following:
            columns = line.count("|")
        assert len(re.findall(r"(?<!\\)\|", line)) == columns
    right = found["extraction"]["own"]["after"]["prefix"]["mean"]
    own = next(line for line in tables if line.startswith("| own |"))
    assert own.split(" | ")[5].startswith(f"{right:.1f}")
    rise = found["perplexity"]["change"]
    assert f"{rise['mean']:+.2f} [{rise['low']:+.2f}, {rise['high']:+.2f}]" in page.split("| perplexity before |")[1]


def test_the_page_tells_bounds(found, tmp_path):
    never = {"steps": None, "max_steps": 9, "limit": 3, "curve": [{"step": 0, "prefix": 2, "loss": 1.0}]}
    soon = never | {"steps": 3}
    lesson = {
        "relearned": {"erased": {"a": soon, "b": soon}, "new": {"c": never, "d": soon, "e": never}},
        "resurfacing": {"new": {"ratio": 3.0, "bound": "at least"}},
    }
    write_audit(tmp_path, found | {"relearning": {"itself": lesson}, "perplexity": None})
    page = (tmp_path / "AUDIT.md").read_text()
    assert "| itself | new | 1 of 3 | over 9 | 3 to over 9 | 2.0 | at least 3 |" in page
    assert "| itself | erased | 2 of 2 | 3 | 3 to 3 | 2.0 |  |" in page
    assert "perplexity before" not in page


@pytest.mark.parametrize(("change", "message"), [
    ({"targets": []}, "targets is empty"),
    ({"controls": []}, "controls is empty"),
    ({"targets": [tiny_sequence(1), named(tiny_sequence(2), "tiny-1")]}, "two targets have the id 'tiny-1'"),
    ({"targets": [named(tiny_sequence(10), "again")]}, "sequence 'related' is a target and among the others"),
    ({"controls": [MemorizedSequence([1, 99], 1)]}, "the model knows 0 to 30"),
])  # fmt: skip
def test_bad_input(models, material, change, message):
    given = dict(zip(("targets", "others", "controls"), material, strict=False)) | change
    with pytest.raises(ValueError, match=message):
        audit(*models, **given, quiet=True)


def test_one_model_is_refused(models, material):
    with pytest.raises(ValueError, match="original and erased are one model"):
        audit(models[0], models[0], *material)


def test_without_others_and_text(models, material):
    targets, _, controls, _ = material
    result = audit(*models, targets, [], controls, relearning=Relearning(max_steps=1), quiet=True)
    assert result["perplexity"] is None
    assert result["accuracy"]["categories"] == {}
    assert set(result["others"]) == {"controls"}
    assert math.isfinite(result["membership"]["after"]["loss"]["mean"])


def test_each_other_text_is_in_one_group(material):
    texts = Texts(*material[:3])
    listed = [each for group in texts.groups().values() for each in group]
    assert sorted(map(id, listed)) == sorted(map(id, [*texts.others, *texts.controls]))
