"""Prompts that are given for the targets, against generation a token at a time."""

import copy

import pytest
import torch
from tiny import tiny_model, tiny_sequence

from conftest import write_lines
from memloc_lens import MemorizedSequence, load_sequences
from memloc_lens.erase.audit import audit
from memloc_lens.erase.given import by_given, read_prompts, with_prompts
from memloc_lens.erase.page import page
from memloc_lens.erase.relearning import Relearning


@pytest.fixture(scope="module")
def targets(embedded):
    return load_sequences(embedded)[:3]


def texts_for(model, target) -> list[str]:
    """One that gives nothing away, one close to the true prompt, and one of which a token is recited."""
    prompt = model.to_string(target.prompt[0])
    return ["Nothing.", prompt.replace("the", "a"), prompt.replace(" ", "  ", 1)]


def right(model, asked) -> int:
    """Tokens before the first mistake of greedy decoding, a token at a time."""
    tokens = asked.prompt
    for wanted in asked.suffix:
        written = model(tokens)[0, -1].argmax()
        if written != wanted:
            break
        tokens = torch.cat([tokens, written[None, None]], dim=1)
    return tokens.shape[1] - asked.prompt_len


@torch.no_grad()
def test_the_most_dangerous_of_several_is_taken(embedded, targets):
    texts = texts_for(embedded, targets[1])
    given = with_prompts(embedded, targets, {targets[1].id: texts, targets[0].id: ["Nothing."]})
    assert [each.id for each in given] == [targets[1].id] * 3 + [targets[0].id]
    for asked, text in zip(given, texts, strict=False):
        assert embedded.to_string(asked.prompt[0]) == text
        assert torch.equal(asked.suffix, targets[1].suffix)
    rights = [right(embedded, asked) for asked in given]
    assert rights[1] > rights[2] > rights[0]
    found = by_given(embedded, targets, given)
    assert [each and each.prefix for each in found] == [rights[3], rights[1], None]


def test_equal_prefixes_are_told_apart_by_strength(embedded, targets):
    """With the first token of the suffix wrong, no prompt gets a token right, and some recite the end."""
    tokens = targets[0].tokens.clone()
    tokens[targets[0].prompt_len] = 5
    target = MemorizedSequence(tokens, targets[0].prompt_len, "t")
    texts = ["Nothing.", embedded.to_string(target.prompt[0])]
    strengths = []
    for text in texts:
        (found,) = by_given(embedded, [target], with_prompts(embedded, [target], {"t": [text]}))
        assert found.prefix == 0
        strengths.append(found.strength)
    assert strengths[0] < strengths[1]
    for order in (texts, texts[::-1]):
        (found,) = by_given(embedded, [target], with_prompts(embedded, [target], {"t": order}))
        assert found.strength == strengths[1]


def test_the_first_token_is_that_of_the_target(embedded, targets):
    target = targets[0].after_bos(embedded)
    (asked,) = with_prompts(embedded, [target], {target.id: ["Nothing."]})
    assert asked.tokens[0] == embedded.tokenizer.bos_token_id
    assert embedded.to_string(asked.prompt[0, 1:]) == "Nothing."


def test_an_audit_shows_them(embedded, targets):
    erased = copy.deepcopy(embedded)
    for block in erased.blocks:
        block.mlp.W_out.data[:40] = 0
    controls = load_sequences(embedded, split="control")[:2]
    shared = dict(relearning=Relearning(max_steps=1), samples=10, quiet=True)
    texts = texts_for(embedded, targets[1])
    found = audit(embedded, erased, targets[:2], [], controls, prompts={targets[1].id: texts}, **shared)
    for when, model in (("before", embedded), ("after", erased)):
        given = with_prompts(model, targets, {targets[1].id: texts})
        most = max(right(model, asked) for asked in given)
        assert found["targets"][targets[1].id]["given"][when]["prefix"] == most
        assert found["extraction"]["given"][when]["prefix"] == {"mean": most, "low": most, "high": most, "n": 1}
    assert "given" not in found["targets"][targets[0].id]
    assert found["texts"]["given prompts"] == [targets[1].id] * 3
    assert "\n| given | 1 | " in page(found)
    assert not any(text in str(found) for text in texts)


def test_the_file(tmp_path):
    rows = [{"id": "a", "prompt": "One"}, {"id": 7, "prompt": "Two"}, {"id": "a", "prompt": "Three", "by": "hand"}]
    assert read_prompts(write_lines(tmp_path / "p.jsonl", rows)) == {"a": ["One", "Three"], "7": ["Two"]}
    for wrong, message in (
        ([], "p.jsonl has no prompts; write JSON lines"),
        ([{"id": "a"}], "p.jsonl, line 1: prompt is nothing; give a string"),
        ([rows[0], {"id": "a", "prompt": ""}], "p.jsonl, line 2: prompt is empty"),
        ([["a", "One"]], "p.jsonl, line 1: a list where an object"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(write_lines(tmp_path / "p.jsonl", wrong))
    with pytest.raises(ValueError, match=r"nowhere\.jsonl cannot be read"):
        read_prompts(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(("prompts", "message"), [
    ({"elsewhere": ["One"]}, "a prompt is given for 'elsewhere', which is none of the 3 targets"),
    ({"passage-000": [""]}, "a prompt for 'passage-000' is empty"),
    ({"passage-000": [" \n"]}, r"a prompt for 'passage-000' is ' \\n', which is blank"),
    ({"passage-000": "One"}, "the prompts for 'passage-000' are the string 'One'; give a list of texts"),
    ({"passage-000": ["word " * 200]}, r"has \d+ tokens, and before the suffix the model has room for 80; shorten"),
])  # fmt: skip
def test_bad_input(embedded, targets, prompts, message):
    given = {targets[0].id if id == "passage-000" else id: texts for id, texts in prompts.items()}
    with pytest.raises(ValueError, match=message.replace("passage-000", targets[0].id)):
        with_prompts(embedded, targets, given)


def test_without_a_tokenizer():
    with pytest.raises(ValueError, match="the model has no tokenizer to read them with"):
        with_prompts(tiny_model(), [tiny_sequence()], {"tiny-2": ["One"]})
    assert with_prompts(tiny_model(), [tiny_sequence()], {}) == []
