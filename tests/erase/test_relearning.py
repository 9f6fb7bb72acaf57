"""Relearning, against a plain training loop on a copy, with greedy decoding a token at a time."""

import copy
import statistics
from itertools import permutations

import pytest
import torch
from tiny import VOCAB, tiny_model, tiny_sequence
from torch.nn.functional import cross_entropy

from conftest import assert_same_state, state_of
from memloc_lens import ComponentSet, MemorizedSequence, ablate
from memloc_lens.erase.relearning import LESSONS, Relearning, relearn, resurfacing


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@torch.no_grad()
def naive_point(model, watched) -> tuple[int, float]:
    tokens, prompt_len = watched.tokens.tolist(), watched.prompt_len
    written, right = tokens[:prompt_len], 0
    while len(written) < len(tokens):
        written.append(int(model(torch.tensor([written]))[0, -1].argmax()))
        if written[-1] != tokens[len(written) - 1]:
            break
        right += 1
    logits = model(watched.tokens[None])[0, prompt_len - 1 : -1]
    return right, cross_entropy(logits, watched.suffix).item()


def naive_curve(model, watched, texts, lr, max_steps, limit) -> list[tuple[int, int, float]]:
    model, curve = copy.deepcopy(model), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(max_steps + 1):
        curve.append((step, *naive_point(model, watched)))
        if curve[-1][1] >= limit:
            break
        losses = [cross_entropy(model(text.tokens[None])[0, :-1], text.tokens[1:], reduction="none") for text in texts]
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        optimizer.step()
    return curve


@pytest.mark.parametrize(("lesson", "learned"), [("itself", True), ("half", False), ("related", False)])
def test_against_a_plain_loop(model, lesson, learned):
    text = tiny_sequence(seed=3, length=11, prompt_len=3)
    related = [tiny_sequence(seed=4, length=9), tiny_sequence(seed=5, length=9), tiny_sequence(seed=6, length=7)]
    watched, texts = {
        "itself": (text, [text]),
        "half": (MemorizedSequence(text.tokens, 5), [MemorizedSequence(text.tokens[:5], 1)]),
        "related": (text, related),
    }[lesson]
    limit = (len(watched.suffix) + 1) // 2
    before = state_of(model)
    found = relearn(Relearning(lr=0.03, max_steps=8), model, text, related)[lesson]
    expected = naive_curve(model, watched, texts, 0.03, 8, limit)
    assert_same_state(before, state_of(model))
    assert [(point["step"], point["prefix"]) for point in found["curve"]] == [point[:2] for point in expected]
    assert [point["loss"] for point in found["curve"]] == pytest.approx([point[2] for point in expected], rel=1e-6)
    assert found["limit"] == limit
    assert found["steps"] == (len(expected) - 1 if learned else None)
    assert (expected[-1][1] >= limit) == learned
    assert found["max_steps"] == 8


def test_texts_take_turns(model):
    """With a batch of one, each text is shown once before any is shown again, in an order of its own."""
    texts = [tiny_sequence(seed=seed) for seed in range(3)]
    settings = dict(lr=0.01, max_steps=3, batch=1)
    found = Relearning(**settings)(model, tiny_sequence(seed=9), texts)
    again = Relearning(**settings)(model, tiny_sequence(seed=9), texts)
    other = Relearning(**settings, seed=3)(model, tiny_sequence(seed=9), texts)
    assert found == again
    assert found != other
    all_orders = []
    for order in permutations(range(3)):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01, weight_decay=0.01)
        for index in order:
            optimizer.zero_grad()
            trained(texts[index].tokens[None], return_type="loss").backward()
            optimizer.step()
        all_orders.append(naive_point(trained, tiny_sequence(seed=9))[1])
    assert min(abs(loss - found["curve"][-1]["loss"]) for loss in all_orders) < 1e-9


def test_what_is_erased_by_weights_can_learn_and_what_is_ablated_cannot():
    model = tiny_model(n_layers=1)
    everything = ComponentSet(torch.ones(1, 6, dtype=torch.bool))
    with ablate(model, everything):
        ablated = Relearning(lr=0.03, max_steps=3)(model, tiny_sequence(), [tiny_sequence()])
    zeroed = tiny_model(n_layers=1)
    zeroed.blocks[0].mlp.W_out.data.zero_()
    written = Relearning(lr=0.03, max_steps=3)(zeroed, tiny_sequence(), [tiny_sequence()])
    assert ablated["curve"][0]["loss"] == pytest.approx(written["curve"][0]["loss"])
    assert ablated["curve"][-1]["loss"] != pytest.approx(written["curve"][-1]["loss"], rel=1e-3)


def test_looks_are_rare_where_asked(model):
    text = tiny_sequence(seed=3, length=11, prompt_len=3)
    each = Relearning(lr=0.01, max_steps=7)(model, text, [tiny_sequence()])["curve"]
    some = Relearning(lr=0.01, max_steps=7, every=3)(model, text, [tiny_sequence()])["curve"]
    assert some == [each[0], each[3], each[6], each[7]]


def test_half_precision_is_restored_and_learned_in_float32():
    model = tiny_model(dtype=torch.bfloat16)
    before = state_of(model)
    found = Relearning(lr=1e-6, max_steps=3)(model, tiny_sequence(), [tiny_sequence()])
    assert_same_state(before, state_of(model))
    assert model.cfg.dtype == torch.bfloat16
    losses = [point["loss"] for point in found["curve"]]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4  # steps that bfloat16 would lose


def test_gradients_and_modes_come_back_after_an_error(model, monkeypatch):
    model.train()
    (model(tiny_sequence().tokens[None]).sum()).backward()
    before = state_of(model)
    monkeypatch.setattr("memloc_lens.erase.relearning.recitation_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Relearning()(model, tiny_sequence(), [tiny_sequence()])
    assert_same_state(before, state_of(model))
    model.zero_grad()
    model.eval()


def test_short_texts_have_no_half(model):
    short = MemorizedSequence([1, 2, 3], 1)
    assert set(relearn(Relearning(max_steps=1), model, short, [])) == {"itself"}
    late = MemorizedSequence(torch.arange(8), 6)
    watched, (half,) = LESSONS["half"](late, [])
    assert watched.prompt_len == 6
    assert half.tokens.tolist() == [0, 1, 2, 3]


def relearned(*steps) -> list[dict]:
    return [{"steps": each, "max_steps": 50, "limit": 1, "curve": []} for each in steps]


@pytest.mark.parametrize(("erased", "new", "ratio", "bound"), [
    ((4,), (12,), 3.0, "exact"),
    ((0, 0, 0), (12, 14, 16), 14.0, "exact"),
    ((4, 8, None), (None, 12, 16), 2.0, "exact"),
    ((5, 5), (None, None), 10.0, "at least"),
    ((None,), (25,), 0.5, "at most"),
    ((None, None), (None,), None, "unknown"),
])  # fmt: skip
def test_resurfacing(erased, new, ratio, bound):
    assert resurfacing(relearned(*erased), relearned(*new)) == {"ratio": ratio, "bound": bound}


def test_the_median_is_one_of_the_texts():
    steps = [3, 5, 7, 9]
    found = resurfacing(relearned(*steps), relearned(20))
    assert found["ratio"] == 20 / statistics.median_low(steps)


@pytest.mark.parametrize(("settings", "message"), [
    ({"lr": 0.0}, "lr is 0.0"),
    ({"max_steps": 0}, "max_steps is 0"),
    ({"every": 0}, "every is 0"),
    ({"batch": 0}, "batch is 0"),
    ({"seed": -1}, "seed is -1"),
])  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Relearning(**settings)


def test_bad_input(model):
    with pytest.raises(ValueError, match="texts is empty"):
        Relearning()(model, tiny_sequence(), [])
    with pytest.raises(ValueError, match=f"the model knows 0 to {VOCAB - 1}"):
        Relearning()(model, tiny_sequence(), [MemorizedSequence([1, 99], 1)])
    with pytest.raises(ValueError, match="0 erased texts and 1 new ones"):
        resurfacing([], relearned(1))
    broken = copy.deepcopy(model)
    broken.W_E.data[int(tiny_sequence(7).tokens[0])] = torch.nan
    with pytest.raises(ValueError, match=r"the loss is nan at step 0 with the learning rate 0\.0001; lower lr"):
        Relearning()(broken, MemorizedSequence([30, 29, 28], 1), [tiny_sequence(7)])
