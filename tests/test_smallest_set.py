"""The smallest set against a scan of all sets, with weights set to zero and plain greedy decoding."""

import copy
from itertools import product

import pytest
import torch
from tiny import VOCAB, tiny_model, tiny_sequence

from conftest import assert_same_state, state_of
from memloc_lens import COMPONENTS, ComponentSet, MemorizedSequence, ablate, mean_activations, smallest_set
from memloc_lens.smallest_set import _boundary

SUFFIX = 6
LIMITS = {"unextractable": 3, "greedy": 5, "accuracy": 70.0, "sampled": 1e-4}
NAMES = {"unextractable": "prefix", "greedy": "prefix", "accuracy": "accuracy", "sampled": "probability"}
SAMPLES = 7


@pytest.fixture(scope="module")
def model():
    return tiny_model(d_mlp=14, n_heads=6, d_head=3, n_layers=3)


def greedy(model, tokens, count):
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens[None])[0, -1].argmax()[None]])
    return tokens


@pytest.fixture(scope="module")
def memorized(model):
    """A sequence that the model recites to its end."""
    prompt = torch.randint(VOCAB, (5,), generator=torch.Generator().manual_seed(3))
    return MemorizedSequence(greedy(model, prompt, SUFFIX), 5, id="memorized")


@torch.no_grad()
def naive_left(model, sequence) -> dict[str, float]:
    """What is left, a token at a time."""
    suffix, prompt_len = sequence.suffix.tolist(), sequence.prompt_len
    recited = greedy(model, sequence.tokens[:prompt_len], len(suffix))[prompt_len:].tolist()
    prefix = next((i for i in range(len(suffix)) if recited[i] != suffix[i]), len(suffix))
    whole, length = sequence.tokens, len(suffix)
    given = next(k for k in range(length + 1) if torch.equal(greedy(model, whole[: prompt_len + k], length - k), whole))
    right, probability = 0, 1.0
    for index, token in enumerate(suffix):
        after = model(sequence.tokens[None, : prompt_len + index])[0, -1].softmax(dim=-1)
        right += int(after.argmax()) == token
        probability *= after[token].item()
    return {
        "prefix": prefix,
        "accuracy": 100 * right / length,
        "probability": 1 - (1 - probability) ** SAMPLES,
        "strength": 1 - given / length,
    }


def naive_sets(scores, first_layer, scope) -> list[torch.Tensor]:
    """The members of the top k, for k from 0 on, one component at a time."""
    layers, units = scores.shape
    together = [range(first_layer, layers)] if scope == "global" else [[layer] for layer in range(first_layer, layers)]
    groups = [list(product(group, range(units))) for group in together]
    ranked = [sorted(group, key=lambda index: -scores[index].item()) for group in groups]
    sets = [torch.zeros(scores.shape, dtype=torch.bool)]
    for k in range(len(ranked[0])):
        sets.append(sets[-1].clone())
        for group in ranked:
            sets[-1][group[k]] = True
    return sets


def without(model, component, members):
    model = copy.deepcopy(model)
    for block, layer in zip(model.blocks, members, strict=True):
        (block.mlp.W_out if component == "neuron" else block.attn.W_O).data[layer] = 0
    return model


@pytest.mark.parametrize(("scope", "component"), [
    ("layer", "head"),
    ("global", "head"),
    *(pytest.param(scope, "neuron", marks=pytest.mark.slow) for scope in ("layer", "global")),
])  # fmt: skip
def test_the_boundary_of_a_scan(model, memorized, component, scope):
    at_boundary, monotone = 0, 0
    for seed, first_layer in ((0, 1), (1, 0)):
        scores = torch.rand(COMPONENTS[component].shape(model), generator=torch.Generator().manual_seed(seed))
        sets = naive_sets(scores, first_layer, scope)
        left = [naive_left(without(model, component, members), memorized) for members in sets]
        for until, limit in LIMITS.items():
            found = smallest_set(
                model, memorized, scores, until, limit=limit, samples=SAMPLES, first_layer=first_layer, scope=scope,
                component=COMPONENTS[component],
            )  # fmt: skip
            extractable = [values[NAMES[until]] >= limit for values in left]
            assert extractable[0]
            if found is None:
                assert extractable[-1]
                continue
            k = [torch.equal(members, found.components.members) for members in sets].index(True)
            assert not extractable[k]
            assert extractable[k - 1]
            assert found.ratio == pytest.approx(k / (len(sets) - 1))
            assert vars(found.left) == pytest.approx(left[k])
            assert vars(found.with_one_fewer) == pytest.approx(left[k - 1])
            at_boundary += 1
            if extractable == sorted(extractable, reverse=True):
                monotone += 1
                assert k == extractable.index(False)
    assert at_boundary >= 6
    assert monotone >= 2


def test_doubling_and_bisection_find_a_boundary():
    """On every pattern of eight counts; the first boundary wherever there is only one."""
    for pattern in product([True, False], repeat=8):
        asked = []

        def extractable(count, pattern=pattern, asked=asked):
            asked.append(count)
            return pattern[count]

        count = _boundary(extractable, len(pattern) - 1)
        assert len(asked) == len(set(asked))
        if count is None:
            assert pattern[0]
            assert pattern[-1]
        elif count == 0:
            assert not pattern[0]
        else:
            assert not pattern[count]
            assert pattern[count - 1]
            assert {count, count - 1} <= set(asked)
        if list(pattern) == sorted(pattern, reverse=True):
            assert count == (None if all(pattern) else pattern.index(False))


def test_few_passes():
    asked = []
    assert _boundary(lambda count: bool(asked.append(count)) or count < 700, 10**6) == 700
    assert len(asked) <= 22


def test_defaults_are_half_of_the_suffix_half_of_the_tokens_and_a_tenth(model, memorized):
    scores = torch.rand(3, 14, generator=torch.Generator().manual_seed(5))
    for until, limit in (("unextractable", 3), ("greedy", 3), ("accuracy", 50), ("sampled", 0.1)):
        found = smallest_set(model, memorized, scores, until)
        given = smallest_set(model, memorized, scores, until, limit=limit, samples=1000)
        assert found.components == given.components
        assert found.left == given.left


def test_what_cannot_be_extracted_needs_no_set(model):
    found = smallest_set(model, tiny_sequence(), torch.rand(3, 14), first_layer=1)
    assert (len(found.components), found.ratio, found.with_one_fewer) == (0, 0.0, None)
    assert found.left.prefix < 2
    assert isinstance(found.components, ComponentSet)


def test_what_no_set_makes_unextractable_has_none(model, memorized):
    untouched = dict(kind="mean", over=mean_activations(model, [memorized]), first_layer=2)
    wiped = smallest_set(model, memorized, torch.rand(3, 14), "sampled", limit=1e-12, **untouched)
    assert wiped is None


def test_the_kind_of_the_ablation(model, memorized):
    """Halving takes more components than zeroing, or does it never; each is what `ablate` says."""
    scores = torch.rand(3, 14, generator=torch.Generator().manual_seed(1))
    for kind, over in (("scale", ()), ("mean", [memorized])):
        found = smallest_set(model, memorized, scores, "accuracy", limit=90.0, kind=kind, over=over)
        with ablate(model, found.components, kind, over=over):
            assert found.left.accuracy == pytest.approx(naive_left(model, memorized)["accuracy"])
        assert found.left.accuracy < 90 <= found.with_one_fewer.accuracy


def test_the_model_stays_as_it_was(model, memorized):
    before = state_of(model)
    smallest_set(model, memorized, torch.linspace(0, 1, 42).view(3, 14))
    assert_same_state(before, state_of(model))


def test_open_ablations_count(model, memorized):
    """Inside an ablation of the first layer, that layer stays ablated."""
    members = torch.zeros(3, 14, dtype=torch.bool)
    members[0, :3] = True
    scores = torch.rand(3, 14, generator=torch.Generator().manual_seed(2))
    with ablate(model, ComponentSet(members)):
        inside = smallest_set(model, memorized, scores, "sampled", limit=0.01, samples=SAMPLES, first_layer=1)
    there = naive_left(without(model, "neuron", members | inside.components.members), memorized)
    assert vars(inside.left) == pytest.approx(there)
