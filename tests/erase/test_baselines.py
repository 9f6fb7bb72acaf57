"""Gradient ascent and NPO, against plain loops on a copy, finite differences, and the formulas by hand."""

import copy
import math

import pytest
import torch
from tiny import VOCAB, tiny_model, tiny_sequence
from torch.nn.functional import cross_entropy

from conftest import assert_same_state, state_of
from memloc_lens import MemorizedSequence
from memloc_lens.erase.baselines import Unlearning, gradient_ascent, npo, npo_loss
from memloc_lens.erase.losses import token_losses

UNLEARN = pytest.mark.parametrize("unlearn", [gradient_ascent, npo])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def targets(model):
    """Two sequences that the model recites to their ends."""
    found = []
    for seed in (3, 4):
        tokens = tiny_sequence(seed, length=4, prompt_len=3).tokens
        for _ in range(6 - seed // 4):
            tokens = torch.cat([tokens, model(tokens[None])[0, -1].argmax()[None]])
        found.append(MemorizedSequence(tokens, 4, id=f"target-{seed}"))
    return found


@pytest.fixture(scope="module")
def retain():
    return [tiny_sequence(seed) for seed in range(10, 13)]


def suffix_losses(model, sequence, prompt_len):
    logits = model(sequence.tokens[None])[0, prompt_len - 1 : -1]
    return cross_entropy(logits, sequence.tokens[prompt_len:], reduction="none")


def naive_loss(name, model, before, targets, retain, weight):
    losses = [suffix_losses(model, target, target.prompt_len) for target in targets]
    if name == "gradient_ascent":
        forget = -sum(each.mean() for each in losses) / len(targets)
    else:  # Zhang et al. (2024), eq. 3: 2/beta E log(1 + (p / p_ref)^beta)
        with torch.no_grad():
            reference = [suffix_losses(before, target, target.prompt_len).sum() for target in targets]
        ratios = [(old - each.sum()).exp() for each, old in zip(losses, reference, strict=True)]
        forget = 2 / 0.1 * sum((1 + ratio**0.1).log() for ratio in ratios) / len(targets)
    return forget + weight * torch.cat([suffix_losses(model, text, 1) for text in retain]).mean()


@UNLEARN
def test_against_a_plain_loop(model, targets, retain, unlearn):
    trained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        naive_loss(unlearn.__name__, trained, model, targets, retain, weight=0.5).backward()
        optimizer.step()
    before = state_of(model)
    with unlearn(model, targets, retain, Unlearning(lr=1e-3, max_steps=3, weight=0.5)) as unlearned:
        assert unlearned.steps == 3
        assert not unlearned.succeeded
        for (name, ours), theirs in zip(model.named_parameters(), trained.parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-6), name
            assert ours.grad is None
    assert_same_state(before, state_of(model))


@UNLEARN
def test_it_ends_when_no_target_can_be_extracted(model, targets, retain, unlearn):
    def prefix(target):
        tokens = target.prompt[0]
        for _ in target.suffix:
            tokens = torch.cat([tokens, model(tokens[None])[0, -1].argmax()[None]])
        return int((tokens == target.tokens)[target.prompt_len :].long().cumprod(dim=0).sum())

    assert [prefix(target) for target in targets] == [len(target.suffix) for target in targets]
    with unlearn(model, targets, retain, Unlearning(lr=0.002, max_steps=60)) as unlearned:
        assert unlearned.succeeded
        assert 1 < unlearned.steps < 60
        left = [prefix(target) for target in targets]
        assert [each.prefix for each in unlearned.left] == left
        assert all(
            2 * each < len(target.suffix) + len(target.suffix) % 2 for each, target in zip(left, targets, strict=True)
        )
    with unlearn(model, targets, retain, Unlearning(lr=0.002, max_steps=unlearned.steps - 1)) as one_fewer:
        assert not one_fewer.succeeded


@UNLEARN
def test_weights_are_restored_after_an_error(model, targets, retain, unlearn):
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt), unlearn(model, targets, retain, Unlearning(max_steps=1)):
        raise KeyboardInterrupt
    assert_same_state(before, state_of(model))
    with pytest.raises(ValueError, match=r"the loss is .* at step .*; lower lr"):
        unlearn(model, targets, retain, Unlearning(lr=1e200, max_steps=9)).__enter__()
    assert_same_state(before, state_of(model))


def test_half_precision_is_trained_in_float32_and_rounded():
    model = tiny_model(dtype=torch.bfloat16)
    whole = tiny_model(dtype=torch.float32)
    for mine, theirs in zip(whole.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs)
    target = MemorizedSequence(torch.cat([torch.tensor([1, 2]), torch.tensor([3, 4])]), 2)
    before = state_of(model)
    settings = dict(targets=[target], retain=[tiny_sequence()], settings=Unlearning(lr=0.02, max_steps=2))
    with npo(model, **settings) as ours, npo(whole, **settings) as theirs:
        assert ours.steps == theirs.steps
        for mine, exact in zip(model.parameters(), whole.parameters(), strict=True):
            assert mine.dtype == torch.bfloat16
            assert torch.equal(mine, exact.bfloat16())
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_npo_by_hand(beta):
    logs = torch.tensor([-3.0, -40.0], dtype=torch.float64)
    assert npo_loss(logs, logs, beta).item() == pytest.approx(2 / beta * math.log(2))
    reference = torch.tensor([-1.0, -44.0], dtype=torch.float64)
    expected = [2 / beta * math.log(1 + math.exp(beta * change)) for change in (-2.0, 4.0)]
    assert npo_loss(logs, reference, beta).item() == pytest.approx(sum(expected) / 2)


def test_the_first_gradient_of_npo_is_that_of_gradient_ascent_and_of_finite_differences(targets):
    model = tiny_model()
    parameters = list(model.parameters())

    def log_probs():
        return torch.stack([-each.sum() for each in token_losses(model, targets)])

    reference = log_probs().detach()
    of_npo = torch.autograd.grad(npo_loss(log_probs(), reference, 0.1), parameters)
    of_ascent = torch.autograd.grad(log_probs().mean(), parameters)
    generator = torch.Generator().manual_seed(0)
    rises = []
    for index, (one, other) in enumerate(zip(of_npo, of_ascent, strict=True)):
        assert torch.allclose(one, other, atol=1e-9)
        direction = torch.randn(one.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            parameters[index].data += sign * 1e-5 * direction
            with torch.no_grad():
                values.append(npo_loss(log_probs(), reference, 0.1).item())
            parameters[index].data -= sign * 1e-5 * direction
        rises.append((values[0] - values[1]) / 2e-5)
        assert rises[-1] == pytest.approx((one * direction).sum().item(), rel=1e-4, abs=1e-6)
    assert max(map(abs, rises)) > 0.1


@pytest.mark.parametrize(("change", "message"), [
    ({"lr": 0.0}, "lr is 0.0"),
    ({"max_steps": 0}, "max_steps is 0"),
    ({"weight": -1.0}, "weight is -1.0"),
    ({"seed": -1}, "seed is -1"),
    ({"until": "greedy", "limit": 0}, "the limit in tokens is 0"),
    ({"beta": 0.0}, "beta is 0.0"),
    ({"retain": []}, "2 targets and 0 texts to retain"),
    ({"targets": [MemorizedSequence([1, 99], 1)]}, f"the model knows 0 to {VOCAB - 1}"),
])  # fmt: skip
def test_bad_input(model, targets, retain, change, message):
    own = {name: value for name, value in change.items() if name in ("targets", "retain", "beta")}
    given = {name: value for name, value in change.items() if name not in own}
    with pytest.raises(ValueError, match=message):
        npo(model, settings=Unlearning(**given), **(dict(targets=targets, retain=retain) | own)).__enter__()
