"""One set for many sequences, against a model whose weights are set to zero and that writes on its own."""

from functools import reduce
from operator import or_

import pytest
import torch

from conftest import PROMPT, make_recited, random_sequence
from memloc_lens import (
    NEURONS,
    WEIGHTS,
    Activations,
    Gradient,
    MemorizedSequence,
    load_model,
    load_sequences,
    smallest_set,
    top_neurons,
)
from memloc_lens.benchmarks.prompts import PROMPTS
from memloc_lens.erase import Budget, Spared, choose, erase_sequences
from memloc_lens.erase.choosing import GROWTH, _Search
from memloc_lens.erase.criteria import left_of, longest_run
from memloc_lens.erase.variants import VARIANTS, prompts_of

ANY = Budget(max_ppl_rise=1e9, max_neg_loss=100)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_recited(tmp_path_factory.mktemp("recited"))
    model = load_model(folder / "model", device="cpu", dtype=torch.float64)
    return model, load_sequences(model, folder / "data.jsonl"), load_sequences(model, folder / "data.jsonl", "control")


def without(model, components):
    """A copy of the model whose weights are zero, one after another, where the set has members."""
    zeroed = {name: weight.clone() for name, weight in model.state_dict().items()}
    for layer, *unit in components.indices():
        zeroed[f"blocks.{layer}.mlp.W_out"][tuple(unit)] = 0
    return zeroed


def continued(model, sequence) -> torch.Tensor:
    """Greedy decoding, a token at a time, without a cache."""
    tokens = sequence.prompt
    for _ in sequence.suffix:
        tokens = torch.cat([tokens, model(tokens, return_type="logits")[:, -1:].argmax(-1)], dim=1)
    return tokens[0, sequence.prompt_len :]


def naive_run(written: list[int], suffix: list[int]) -> int:
    """The longest part, from all parts of both."""
    parts = {tuple(written[a:b]) for a in range(len(written)) for b in range(a + 1, len(written) + 1)}
    own = [tuple(suffix[a:b]) for a in range(len(suffix)) for b in range(a + 1, len(suffix) + 1)]
    return max((len(part) for part in own if part in parts), default=0)


@pytest.mark.parametrize("component", [NEURONS, WEIGHTS], ids=["neurons", "weights"])
def test_what_is_left_is_what_a_zeroed_model_writes(model, component):
    model, sequences, controls = model
    scores = Gradient(component=component.name)(model, sequences)
    erasure = choose(model, sequences, scores, Spared(others=controls), ANY, component=component, scope="global")
    assert erasure.extracted == []
    assert [target.before["own"] for target in erasure.targets] == [len(own.suffix) for own in sequences]
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(without(model, erasure.components))
    try:
        for target, sequence in zip(erasure.targets, sequences, strict=True):
            for name, vary in VARIANTS.items():
                asked = vary(model, sequence) or sequence
                assert target.after[name] == naive_run(continued(model, asked).tolist(), asked.suffix.tolist())
                assert target.after[name] < target.limit == 4
        right = [model(own.tokens[None])[0, PROMPT - 1 : -1].argmax(-1) == own.suffix for own in controls]
    finally:
        model.load_state_dict(original)
    assert erasure.after.accuracy == pytest.approx(100 * torch.stack(right).double().mean().item(), abs=1e-4)


NAIVE = {
    "greedy": lambda logits, suffix: next((n for n, r in enumerate(logits.argmax(-1) == suffix) if not r), len(suffix)),
    "accuracy": lambda logits, suffix: 100 * (logits.argmax(-1) == suffix).double().mean().item(),
    "sampled": lambda logits, suffix: 1 - (1 - logits.softmax(-1)[range(len(suffix)), suffix].prod().item()) ** 1000,
}
"""What is left of a suffix, from the logits at its tokens."""


@pytest.mark.parametrize(("until", "limit"), [("greedy", 4), ("accuracy", 30)])
def test_other_criteria_against_a_zeroed_model(model, until, limit):
    model, sequences, _ = model
    scores = Gradient()(model, sequences)
    erasure = choose(model, sequences, scores, Spared(), until=until, limit=limit, scope="global")
    assert (erasure.extracted, erasure.until) == ([], until)
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(without(model, erasure.components))
    try:
        for target, sequence in zip(erasure.targets, sequences, strict=True):
            for name, vary in VARIANTS.items():
                asked = vary(model, sequence) or sequence
                logits = model(asked.tokens[None])[0, asked.prompt_len - 1 : -1]
                assert target.after[name] == pytest.approx(NAIVE[until](logits, asked.suffix), abs=1e-9)
                assert target.after[name] < target.limit == limit <= target.before["own"]
    finally:
        model.load_state_dict(original)


@pytest.mark.parametrize("until", list(NAIVE))
def test_what_is_left_by_each_prompt(model, until):
    model, sequences, _ = model
    prompts = prompts_of(model, sequences)
    for index, left in enumerate(left_of(model, prompts, until)):
        for name, asked in prompts.items():
            logits = model(asked[index].tokens[None])[0, asked[index].prompt_len - 1 : -1]
            assert left[name] == pytest.approx(NAIVE[until](logits, asked[index].suffix), rel=1e-6, abs=1e-12)


def test_the_way_to_a_budget_that_is_too_small(model):
    model, sequences, _ = model
    targets, others = sequences[:3], sequences[3:]
    scores = Activations()(model, targets)
    enough = choose(model, targets, scores, Spared(others=others), ANY)
    assert enough.succeeded
    assert enough.neg_loss > 1
    small = choose(model, targets, scores, Spared(others=others), Budget(max_neg_loss=enough.neg_loss / 100))
    assert not small.succeeded
    assert not small.within_budget
    assert [step.name for step in small.steps[:3]] == [own.id for own in targets]  # measured to the end
    counts = [step.count for step in enough.steps]
    assert counts == sorted(counts)
    assert counts[-1] == len(enough.components)
    assert small.steps[:2] == enough.steps[:2]


def test_growth_ends_when_nothing_is_extracted(model, monkeypatch):
    """Of two sequences one is extracted until its own set has 20 components or more, whatever is asked."""
    model, sequences, _ = model

    def left(search):
        return [{"own": 8 if search.counts[0] < 20 else 0}, {"own": 0}]

    monkeypatch.setattr(_Search, "left", left)
    scores = Activations()(model, sequences[:2])
    grown = choose(model, sequences[:2], scores, Spared(), limit=8, scope="global")
    first = grown.targets[0]
    start = smallest_set(model, sequences[0], scores[0], limit=8, scope="global")
    assert len(start.components) < 20 <= first.own < 20 * GROWTH + 1
    tops = [top_neurons(own, target.own / 384, scope="global", rounding="nearest") if target.own else None
            for own, target in zip(scores, grown.targets, strict=True)]  # fmt: skip
    assert grown.components == reduce(or_, filter(None, tops))
    assert [step.extracted for step in grown.steps] == [None, *[1] * (len(grown.steps) - 2), 0]
    assert grown.extracted == []


def test_longest_run():
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        one, other = torch.randint(3, (7,), generator=draw), torch.randint(3, (9,), generator=draw)
        assert longest_run(one, other) == naive_run(one.tolist(), other.tolist())


def test_variants_ask_for_the_same_text(embedded):
    sequence = load_sequences(embedded)[0]
    assert VARIANTS.keys() > PROMPTS.keys()
    for name, vary in VARIANTS.items():
        asked = vary(embedded, sequence)
        assert torch.equal(asked.suffix, sequence.suffix[-len(asked.suffix) :])
        assert name == "own" or not torch.equal(asked.prompt, sequence.prompt)
        assert len(asked.tokens) <= embedded.cfg.n_ctx
    long = MemorizedSequence(torch.arange(embedded.cfg.n_ctx), 100)
    assert all(len(asked.tokens) <= embedded.cfg.n_ctx for vary in VARIANTS.values() if (asked := vary(embedded, long)))


def test_the_first_token_stays_the_first(embedded):
    sequence = load_sequences(embedded)[0].after_bos(embedded)
    for name in ("surrounded", "upper", "later"):
        assert VARIANTS[name](embedded, sequence).tokens[0] == embedded.tokenizer.bos_token_id


def test_wrong_use(model, tmp_path):
    model, sequences, _ = model
    with pytest.raises(ValueError, match="1 sequences and 2 scores were given"):
        choose(model, sequences[:1], Gradient()(model, sequences[:2]), Spared())
    with pytest.raises(ValueError, match="max_ppl_rise is -1"):
        Budget(max_ppl_rise=-1)
    with pytest.raises(ValueError, match="'s0' of the context and 's0'"):
        erase_sequences(model, sequences[:1], spared=Spared(others=sequences))
    spared = Spared(others=[random_sequence(5)])
    with pytest.raises(ValueError, match="'random-5' of the context and 'random-5'"):
        erase_sequences(model, sequences[:1], spared=spared, context=[random_sequence(5)])
    with pytest.raises(ValueError, match="exists; name a folder"):
        erase_sequences(model, sequences[:1], spared=Spared(), source="embedded", out=tmp_path)
