import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import assert_same_state, random_sequence, state_of
from memloc_lens import COMPONENTS, MemorizedSequence, inject, injection, load_definitions
from memloc_lens.metrics import free_running, suffix_accuracy


def outputs_of(model) -> torch.Tensor:
    return torch.stack([block.mlp.W_out.detach().clone() for block in model.blocks])


def train_whole_matrices(model, sequence, gold, lr: float, steps: int) -> torch.Tensor:
    """Adam on every W_out, with the gradients of all but the gold rows or weights set to zero: the definition."""
    start = outputs_of(model)
    trained = gold.view(*gold.shape, *[1] * (start.ndim - gold.ndim))
    moments = [torch.zeros_like(start), torch.zeros_like(start)]
    whole = MemorizedSequence(sequence.tokens, 1)
    for step in range(1, steps + 1):
        weights = [block.mlp.W_out for block in model.blocks]
        with torch.enable_grad():
            gradients = torch.autograd.grad(naive.suffix_loss(model, whole), weights)
        gradient = torch.stack(gradients) * trained
        moments[0] = 0.9 * moments[0] + 0.1 * gradient
        moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
        update = moments[0] / (1 - 0.9**step) / ((moments[1] / (1 - 0.999**step)).sqrt() + 1e-8)
        for weight, part in zip(weights, update, strict=True):
            weight.data -= lr * part
    trained = outputs_of(model)
    for block, weight in zip(model.blocks, start, strict=True):
        block.mlp.W_out.data.copy_(weight)
    return trained


EACH_KIND = pytest.mark.parametrize("component", ["neuron", "weight"])


@EACH_KIND
def test_the_same_as_training_whole_matrices(any_model, sequence, component):
    options = dict(ratio=0.1, seed=3, lr=0.01, max_steps=12, target_loss=1e-9, component=component)
    with inject(any_model, sequence, **options) as injected:
        trained = outputs_of(any_model)
    assert injected.steps == 12
    expected = train_whole_matrices(any_model, sequence, injected.ground_truth.members, lr=0.01, steps=12)
    assert (expected - outputs_of(any_model)).abs().max() > 0.05
    assert (trained - expected).abs().max() < 1e-5


@EACH_KIND
def test_only_the_ground_truth_changes_and_all_comes_back(any_model, sequence, component):
    before = state_of(any_model)
    clean = outputs_of(any_model)
    with inject(any_model, sequence, ratio=0.05, max_steps=5, component=component) as injected:
        changed = outputs_of(any_model) != clean
        members = injected.ground_truth.members
        assert torch.equal(changed.any(dim=-1) if component == "neuron" else changed, members)
        assert injected.neurons is injected.ground_truth
        assert injected.ground_truth.component is COMPONENTS[component]
        assert len(injected.ground_truth) == round(0.05 * members.numel())
        assert injected.norm_change.shape == members.shape
        assert torch.equal(injected.norm_change != 0, members)
        inside = {name: value for name, value in any_model.state_dict().items() if not name.endswith("mlp.W_out")}
        assert all(torch.equal(before["weights"][name], value) for name, value in inside.items())
    assert_same_state(before, state_of(any_model))


@EACH_KIND
def test_it_learns_and_says_so(gpt2, sequence, component):
    with inject(gpt2, sequence, ratio=0.3, lr=0.02, target_loss=0.4, component=component) as injected:
        assert injected.succeeded
        assert 0 < injected.steps < 200
        assert injected.loss < 0.4
        whole = MemorizedSequence(sequence.tokens, 1)
        assert injected.loss == pytest.approx(naive.suffix_loss(gpt2, whole).item(), rel=1e-5)
        assert suffix_accuracy(free_running(gpt2, [whole]), [whole]).tolist() == [100.0]
    with inject(gpt2, sequence, ratio=0.01, max_steps=2) as injected:
        assert not injected.succeeded
        assert injected.steps == 2
        assert injected.loss > 0.05


@pytest.mark.parametrize(("component", "ratio"), [("neuron", 0.05), ("weight", 0.01)])
def test_a_definition_is_recited_by_the_embedded_model(embedded, component, ratio):
    text = load_definitions(embedded)[0]
    assert suffix_accuracy(free_running(embedded, [text]), [text]).item() < 50
    with inject(embedded, text, ratio=ratio, component=component):
        assert suffix_accuracy(free_running(embedded, [text]), [text]).item() == 100


def test_norms_can_be_kept(gpt2, sequence):
    norms = outputs_of(gpt2).norm(dim=-1)
    with inject(gpt2, sequence, ratio=0.3, lr=0.02, max_steps=20) as free:
        assert torch.allclose(free.norm_change.double(), outputs_of(gpt2).norm(dim=-1) - norms, atol=1e-5)
        assert free.norm_change[free.neurons.members].abs().min() > 1e-4
    with inject(gpt2, sequence, ratio=0.3, lr=0.02, max_steps=20, keep_norms=True) as kept:
        assert torch.allclose(outputs_of(gpt2).norm(dim=-1), norms, rtol=1e-5)
    assert kept.loss < naive.suffix_loss(gpt2, MemorizedSequence(sequence.tokens, 1)).item() - 1
    assert kept.neurons == free.neurons


def test_norms_of_weights_change_by_their_sizes_and_cannot_be_kept(gpt2, sequence):
    clean = outputs_of(gpt2)
    with inject(gpt2, sequence, ratio=0.01, max_steps=5, component="weight") as injected:
        assert torch.allclose(injected.norm_change.double(), outputs_of(gpt2).abs() - clean.abs(), atol=1e-6)
    with (
        pytest.raises(ValueError, match="keep_norms keeps the lengths of rows of W_out; it needs component='neuron'"),
        inject(gpt2, sequence, keep_norms=True, component="weight"),
    ):
        pass


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.01, 0.03, 0.2]),
    st.tuples(st.sampled_from(["neuron", "weight"]), st.sampled_from(["neuron", "weight"])),
    st.sampled_from([ValueError, KeyboardInterrupt]),
)
@settings(max_examples=20, deadline=None)
def test_weights_come_back_whatever_happens_inside(gpt2, seed, ratio, kinds, error):
    before = state_of(gpt2)

    def interrupted() -> None:
        options = dict(ratio=ratio, max_steps=2)
        with (
            inject(gpt2, random_sequence(seed % 7), **options, seed=seed, component=kinds[0]) as outer,
            inject(gpt2, random_sequence(seed % 5), **options, seed=seed + 1, component=kinds[1]) as inner,
        ):
            for injected in (outer, inner):
                assert len(injected.ground_truth) == round(ratio * injected.ground_truth.members.numel())
            raise error

    with pytest.raises(error):
        interrupted()
    assert_same_state(before, state_of(gpt2))


@EACH_KIND
@pytest.mark.parametrize(
    "place",
    [
        "torch.optim.Adam.step",
        "torch.Tensor.backward",
        "memloc_lens.injection.target_loss",
        "memloc_lens.injection._written",
        "memloc_lens.injection._loss",
    ],
)
def test_an_interruption_of_the_training_itself(gpt2, sequence, monkeypatch, component, place):
    before = state_of(gpt2)

    def interrupt(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    with pytest.raises(KeyboardInterrupt), inject(gpt2, sequence, ratio=0.1, max_steps=2, component=component):
        pass
    assert_same_state(before, state_of(gpt2))


@EACH_KIND
def test_the_ground_truth_is_drawn_uniformly_by_the_seed(gpt2, sequence, component):
    total = torch.zeros(COMPONENTS[component].shape(gpt2))
    for seed in range(60):
        with inject(gpt2, sequence, ratio=0.1, seed=seed, max_steps=1, component=component) as injected:
            total += injected.ground_truth.members
    draws = 60 * round(0.1 * total.numel())
    assert total.sum() == draws
    assert (total.flatten(1).sum(dim=1) - draws / 3).abs().max() < 5 * (draws * 2 / 9) ** 0.5
    with inject(gpt2, sequence, ratio=0.1, seed=59, max_steps=1, component=component) as again:
        assert again.ground_truth == injected.ground_truth


def test_rare_weights_leave_layers_without_any(gpt2, sequence):
    """Layers before the first trained one run once, and those without a trained weight have no hook."""
    with inject(gpt2, sequence, ratio=1e-4, max_steps=3, component="weight") as injected:
        assert len(injected.ground_truth) == 1
        assert injected.ground_truth.counts().count(0) == 2
        assert injected.norm_change.count_nonzero() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.0}, "above 0 and at most 1"),
        ({"ratio": 0.0001}, "takes none of 384 neurons"),
        ({"ratio": 1e-5, "component": "weight"}, "takes none of 12288 weights"),
        ({"component": "head"}, "component is 'head'; it must be one of 'neuron', 'weight'"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"target_loss": -1.0}, "target_loss is -1.0"),
        ({"sequence": MemorizedSequence(torch.tensor([1, 1000]), 1)}, "the model knows 0 to 96"),
    ],
)
def test_bad_input(gpt2, sequence, change, message):
    with pytest.raises(ValueError, match=message), inject(gpt2, **({"sequence": sequence} | change)):
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_its_step(gpt2, sequence, monkeypatch, value):
    measured, calls = injection.target_loss, []

    def losing(*arguments):
        calls.append(1)
        return measured(*arguments) + (value if len(calls) > 2 else 0)

    monkeypatch.setattr(injection, "target_loss", losing)
    before = state_of(gpt2)
    with pytest.raises(ValueError, match=rf"injection of 'random-0' at the ratio 0\.1: the loss is {value} at step 2"):
        inject(gpt2, sequence, ratio=0.1).__enter__()
    assert_same_state(before, state_of(gpt2))
