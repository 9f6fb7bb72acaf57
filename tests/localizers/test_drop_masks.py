"""Drop masks against their formulas, written out with plain loops, one sequence at a time."""

import math
from dataclasses import replace

import naive
import pytest
import torch
from tiny import VOCAB, tiny_model, tiny_sequence

from conftest import assert_same_state, state_of
from memloc_lens import (
    COMPONENTS,
    BalancedSubnet,
    DropMask,
    IterativeGradient,
    MemorizedSequence,
    ablate,
    top_components,
)
from memloc_lens.localizers.masking import masked_residual

CONTEXT = tuple(tiny_sequence(seed, length, prompt_len) for seed, length, prompt_len in (
    (10, 8, 4), (11, 6, 1), (12, 8, 4), (13, 12, 3), (14, 5, 2)))  # fmt: skip
SEQUENCES = [tiny_sequence(2), tiny_sequence(3, length=7), tiny_sequence(4), tiny_sequence(5, prompt_len=2)]
DROP = DropMask(steps=4, lr=0.1, start="scratch", ratio=0.5, retained=2, penalty=0.7, context=CONTEXT)
BALANCED = BalancedSubnet(steps=4, ratio=0.5, retained=2, lr=0.5, context=CONTEXT)
EACH = pytest.mark.parametrize("localizer", [DROP, BALANCED], ids=lambda localizer: localizer.name)
EACH_COMPONENT = pytest.mark.parametrize("component", COMPONENTS)
NEURON_OR_SLOW = pytest.mark.parametrize(
    "component", ["neuron", *(pytest.param(name, marks=pytest.mark.slow) for name in ("head", "weight"))]
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def draws(settings, seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(len(CONTEXT), generator=generator).tolist()[: settings.retained]


def dropped_of(values: torch.Tensor, count: int) -> torch.Tensor:
    """1 for the highest of a layer: a full sort, of equal values the first."""
    order = sorted(range(values.numel()), key=lambda unit: (-values.flatten()[unit].item(), unit))
    mask = torch.zeros(values.numel())
    mask[order[:count]] = 1
    return mask.view_as(values)


class Dropped(torch.autograd.Function):
    """The mask of a layer: what is kept forward; minus the slope of a surrogate backward."""

    @staticmethod
    def forward(ctx, values, score, slope, count):
        ctx.slope = slope
        return 1 - dropped_of(score, count)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope, None, None, None


def naive_drop_mask(model, sequence, settings: DropMask) -> torch.Tensor:
    shape = naive.shape_of(model, settings.component)
    count = int(settings.ratio * math.prod(shape[1:]))
    noise = 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed))
    clean = [naive.suffix_loss(model, other).detach() for other in CONTEXT]
    drawn = draws(settings, settings.seed)

    def objective(values: list[torch.Tensor]) -> torch.Tensor:
        keep = [Dropped.apply(v, v.detach(), -(v.sigmoid() * (1 - v.sigmoid())).detach(), count) for v in values]
        masks = {settings.component: keep}
        probabilities = naive.masked_logits(model, sequence.tokens[None], masks)[0].softmax(-1)
        gold = [probabilities[t - 1, sequence.tokens[t]] for t in range(sequence.prompt_len, len(sequence.tokens))]
        total = sum(-torch.log(1 - p) for p in gold) / len(gold)
        for index in next(drawn) if settings.penalty else ():
            rise = naive.suffix_loss(model, CONTEXT[index], masks=masks) - clean[index]
            total = total + settings.penalty * max(rise, 0 * rise) / settings.retained
        return total

    return torch.stack(naive.adam(list(noise), objective, settings.steps, settings.lr))


def naive_balanced_subnet(model, sequence, settings: BalancedSubnet) -> torch.Tensor:
    shape = naive.shape_of(model, settings.component)
    count = int(settings.ratio * math.prod(shape[1:]))
    generator = torch.Generator().manual_seed(settings.seed)
    bound = shape[-1] ** -0.5  # of the Kaiming-uniform distribution with a = sqrt(5): 1 / sqrt(inputs)
    values = [torch.rand(shape[1:], generator=generator) * 2 * bound - bound for _ in range(shape[0])]
    velocity = [torch.zeros_like(value) for value in values]
    for _, drawn in zip(range(settings.steps), draws(settings, settings.seed), strict=False):
        leaves = [value.requires_grad_(True) for value in values]
        keep = [Dropped.apply(v, -v.detach().abs(), v.detach().sign(), count) for v in leaves]
        masks = {settings.component: keep}
        objective = -naive.suffix_loss(model, sequence, masks=masks)
        for index in drawn:
            objective = objective + naive.suffix_loss(model, CONTEXT[index], masks=masks) / settings.retained
        gradients = torch.autograd.grad(objective, leaves)
        values = []
        for layer, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            decayed = gradient + settings.weight_decay * leaf.detach()
            velocity[layer] = settings.momentum * velocity[layer] + decayed
            values.append(leaf.detach() - settings.lr * velocity[layer])
    return -torch.stack(values).abs()


@EACH_COMPONENT
@pytest.mark.parametrize("penalty", [0.0, 0.7, 3.0])
def test_drop_mask(model, component, penalty):
    settings = replace(DROP, component=component, penalty=penalty, seed=1, steps=6)
    scores = settings(model, SEQUENCES[0])
    assert torch.allclose(scores, naive_drop_mask(model, SEQUENCES[0], settings).float(), atol=2e-5)
    assert scores.std() > 0.05


@EACH_COMPONENT
def test_balanced_subnet(model, component):
    settings = replace(BALANCED, component=component, seed=1, steps=6)
    scores = settings(model, SEQUENCES[0])
    assert torch.allclose(scores, naive_balanced_subnet(model, SEQUENCES[0], settings).float(), atol=1e-5)
    untrained = replace(settings, lr=1e-9)(model, SEQUENCES[0])
    assert (scores - untrained).norm() > 0.05 * untrained.norm()


@EACH
@NEURON_OR_SLOW
def test_scores_of_a_list_are_those_of_its_members(model, localizer, component):
    localizer = replace(localizer, component=component)
    together = localizer(model, SEQUENCES)
    assert together.dtype == torch.float32
    for scores, sequence in zip(together, SEQUENCES, strict=True):
        assert torch.allclose(scores, localizer(model, sequence), atol=1e-5)


@EACH
@NEURON_OR_SLOW
def test_scores_depend_on_the_sequence_the_context_and_the_seed(model, localizer, component):
    localizer = replace(localizer, component=component)
    scores = localizer(model, SEQUENCES[0])
    for other in (
        localizer(model, SEQUENCES[2]),
        replace(localizer, context=CONTEXT[:3])(model, SEQUENCES[0]),
        replace(localizer, seed=5)(model, SEQUENCES[0]),
    ):
        assert not torch.allclose(scores, other, atol=1e-4)


@EACH
@EACH_COMPONENT
def test_exactly_the_share_of_every_layer_is_off_in_every_step(model, localizer, component, monkeypatch):
    localizer = replace(localizer, component=component)
    seen = []

    def watched(*arguments):
        masked = masked_residual(*arguments)
        return lambda values: seen.append(values.detach().clone()) or masked(values)

    monkeypatch.setattr("memloc_lens.localizers.drop_masks.masked_residual", watched)
    localizer(model, SEQUENCES[0])
    masks = [values for values in seen if (values != 1).any()]
    assert len(masks) == localizer.steps * (1 + localizer.retained)
    count = int(0.5 * math.prod(COMPONENTS[component].shape(model)[1:]))
    for values in masks:
        assert set(values.unique().tolist()) == {0, 1}
        assert ((values == 0).flatten(2).sum(dim=-1) == count).all()


@EACH
def test_the_scores_name_the_set_of_the_next_step(model, localizer, monkeypatch):
    seen = []

    def watched(*arguments):
        masked = masked_residual(*arguments)
        return lambda values: seen.append(values.detach()[0]) or masked(values)

    scores = localizer(model, SEQUENCES[0])
    monkeypatch.setattr("memloc_lens.localizers.drop_masks.masked_residual", watched)
    replace(localizer, steps=localizer.steps + 1)(model, SEQUENCES[0])
    assert torch.equal(top_components(scores, 0.5).members, seen[-1] == 0)


@EACH
@EACH_COMPONENT
def test_first_layer(model, localizer, component):
    scores = replace(localizer, component=component, first_layer=1)(model, SEQUENCES[0])
    assert (scores[0] == 0).all()
    assert (scores[1] != 0).any()


@EACH
@EACH_COMPONENT
def test_the_model_is_left_as_found(localizer, component):
    model = tiny_model().train()
    model.blocks[1].mlp.W_out.requires_grad_(False)
    model.unembed.W_U.grad = torch.ones_like(model.unembed.W_U)
    before = state_of(model)
    with torch.no_grad():
        replace(localizer, component=component)(model, SEQUENCES)
    assert_same_state(before, state_of(model))


@EACH
def test_a_small_budget_changes_no_score(model, localizer, monkeypatch):
    scores = localizer(model, SEQUENCES)
    for module in ("scoring", "drop_masks"):
        monkeypatch.setattr(f"memloc_lens.localizers.{module}.rows_at_once", lambda *arguments: 1)
    assert torch.allclose(localizer(model, SEQUENCES), scores, atol=1e-5)


@EACH
def test_the_context_is_prepared_once(model, localizer):
    """No layer before the first masked one runs in a step."""
    tokens = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda embedded, hook: tokens.append(embedded.shape[:2]))]):
        replace(localizer, steps=10, first_layer=1)(model, [SEQUENCES[0], SEQUENCES[2]])
    assert sorted(tokens) == sorted([(2, 8)] + [(1, len(sequence.tokens)) for sequence in CONTEXT])


@pytest.mark.slow
def test_the_sequence_is_lost_and_the_context_is_kept(gpt2_that_recites):
    """What the masks are for: on a model trained to recite, the context's loss rises less with a penalty."""
    model, targets, others = gpt2_that_recites
    rises = {}
    for penalty in (0.0, 5.0):
        localizer = DropMask(steps=30, lr=0.1, start="scratch", ratio=0.15, penalty=penalty, context=tuple(others))
        lost, risen = [], []
        for target, scores in zip(targets, localizer(model, targets), strict=True):
            with ablate(model, top_components(scores, 0.15)), torch.no_grad():
                lost.append(naive.suffix_loss(model, target).item())
                risen += [naive.suffix_loss(model, other).item() for other in others]
        assert min(lost) > 0.3
        rises[penalty] = sum(risen)
    assert rises[5.0] < 0.8 * rises[0.0]


@pytest.fixture(scope="module")
def gpt2_that_recites():
    """A tiny model that is trained to recite ten rows, of which two are targets."""
    model = tiny_model(d_mlp=40, d_model=16, dtype=torch.float32)
    sequences = [tiny_sequence(seed, length=10, prompt_len=3) for seed in range(20, 30)]
    tokens = torch.stack([sequence.tokens for sequence in sequences])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model(tokens, return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), sequences[:2], sequences[2:]


@NEURON_OR_SLOW
def test_start_from_iterative_gradients(model, component):
    """Before it has learned, the mask drops what iterative gradients lock; then it learns."""
    settings = replace(DROP, component=component, start="iterative-gradient", lr=1e-9)
    iterative = IterativeGradient(max_ratio=0.5, component=component, context=CONTEXT)
    of_list = settings(model, SEQUENCES)
    for sequence, scores in zip(SEQUENCES, of_list, strict=True):
        kind = COMPONENTS[component]
        expected = top_components(iterative(model, sequence), 0.5, component=kind).members
        assert torch.equal(top_components(scores, 0.5, component=kind).members, expected)
        order = naive.top(iterative(model, sequence), 1, 0, "layer")
        assert naive.top(scores, 1, 0, "layer") == order
    assert (replace(settings, lr=0.1)(model, SEQUENCES) - of_list).abs().max() > 0.1


def test_without_a_context(model):
    alone = replace(DROP, context=())(model, SEQUENCES[0])
    assert torch.equal(alone, replace(DROP, penalty=0)(model, SEQUENCES[0]))
    with pytest.raises(ValueError, match=r"balanced-subnet has no context.*--context"):
        replace(BALANCED, context=())(model, SEQUENCES[0])


@EACH
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0"),
        ({"ratio": 0.0}, "ratio is 0"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"retained": 0}, "retained is 0"),
        ({"first_layer": -1}, "first_layer is -1"),
    ],
)
def test_wrong_settings(localizer, wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(localizer, **wrong)


@EACH
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 0.01}, "takes none of 6 neurons"),
        ({"context": (MemorizedSequence([1, VOCAB], 1, "odd"),)}, "'odd' has tokens from 1 to 31"),
        ({"first_layer": 2}, "first_layer is 2"),
        ({"context": (*CONTEXT, SEQUENCES[1])}, "'tiny-3' of the context and 'tiny-3'"),
    ],
)
def test_wrong_use(model, localizer, wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(localizer, **wrong)(model, SEQUENCES)


@EACH
def test_a_loss_that_is_not_finite_names_the_sequence(localizer):
    model = tiny_model(dtype=torch.float32)
    model.unembed.b_U.data[int(SEQUENCES[2].tokens[-1])] = torch.nan
    with pytest.raises(ValueError, match=f"{localizer.name}, sequence 'tiny-[2-5]': the loss is NaN"):
        localizer(model, SEQUENCES)
