import math

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import EACH_COMPONENT, random_sequence, some_of
from memloc_lens import (
    COMPONENTS,
    HEADS,
    NEURONS,
    WEIGHTS,
    ComponentSet,
    MemorizedSequence,
    Neurons,
    ablate,
    mean_activations,
    top_components,
)
from memloc_lens.metrics import (
    auroc,
    average_precision,
    free_running,
    perplexity,
    recall,
    recall_ceiling,
    row_losses,
    suffix_accuracy,
    suffix_loss,
    teacher_forced,
    text_distance,
    text_rows,
)

SEQUENCES = [random_sequence(0), random_sequence(1, length=9), random_sequence(2), random_sequence(3, prompt_len=1)]


def edit_distance(one: str, other: str) -> int:
    """Wagner & Fischer (1974)."""
    row = list(range(len(other) + 1))
    for i, character in enumerate(one, start=1):
        previous, row[0] = row[0], i
        for j, wanted in enumerate(other, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (character != wanted))
    return row[-1]


@torch.no_grad()
def test_teacher_forced_and_loss(any_model):
    predictions, losses = teacher_forced(any_model, SEQUENCES, batch=2), suffix_loss(any_model, SEQUENCES, batch=2)
    for predicted, loss, sequence in zip(predictions, losses, SEQUENCES, strict=True):
        logits = any_model(sequence.tokens[None], return_type="logits")[0]
        assert predicted.tolist() == logits.argmax(-1)[sequence.prompt_len - 1 : -1].tolist()
        assert loss.item() == pytest.approx(naive.suffix_loss(any_model, sequence).item(), rel=1e-5)


@torch.no_grad()
def test_free_running_feeds_itself(any_model):
    for predicted, sequence in zip(free_running(any_model, SEQUENCES, batch=2), SEQUENCES, strict=True):
        tokens = sequence.prompt
        while tokens.shape[1] < len(sequence.tokens):
            tokens = torch.cat([tokens, any_model(tokens, return_type="logits")[:, -1:].argmax(-1)], dim=1)
        assert predicted.tolist() == tokens[0, sequence.prompt_len :].tolist()


def test_accuracy_counts_tokens_in_points():
    sequence = MemorizedSequence(torch.tensor([5, 1, 2, 3, 4]), 1)
    assert suffix_accuracy([torch.tensor([1, 2, 3, 0])], [sequence]).tolist() == [75.0]


@given(st.lists(st.integers(1, 4095), min_size=3, max_size=12), st.data())
def test_distance_is_the_edit_distance_of_the_texts(embedded, tokens, data):
    sequence = MemorizedSequence(torch.tensor(tokens), 2)
    predicted = data.draw(st.lists(st.integers(1, 4095), min_size=len(tokens) - 2, max_size=len(tokens) - 2))
    guess = embedded.tokenizer.decode(tokens[:2] + predicted)
    expected = edit_distance(embedded.tokenizer.decode(tokens), guess)
    assert text_distance(embedded, [torch.tensor(predicted)], [sequence]).tolist() == [expected]


def test_distance_needs_a_tokenizer(gpt2, sequence):
    with pytest.raises(ValueError, match="no tokenizer"):
        text_distance(gpt2, [sequence.suffix], [sequence])


@torch.no_grad()
def test_perplexity_is_of_all_tokens_but_the_first_of_each_row(gpt2):
    rows = torch.stack([random_sequence(seed).tokens for seed in range(5)])
    log_probs = gpt2(rows, return_type="logits").log_softmax(-1)
    losses = [-log_probs[row, t - 1, rows[row, t]].item() for row in range(5) for t in range(1, rows.shape[1])]
    assert perplexity(gpt2, rows, batch=2) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    by_row = torch.tensor(losses, dtype=torch.float64).view(5, -1).mean(dim=1)
    assert torch.allclose(row_losses(gpt2, rows.short(), batch=2), by_row, rtol=1e-6)


def test_text_rows(embedded):
    rows = text_rows(embedded, ["Return the number of items.", "Raise an error."] * 20, tokens=50, length=16)
    assert rows.shape == (3, 16)
    assert embedded.tokenizer.decode(rows.flatten().tolist()).startswith(
        "Return the number of items.<|endoftext|>Raise an"
    )
    with pytest.raises(ValueError, match="do not fill one row of 128"):
        text_rows(embedded, ["Return"], tokens=500)


@EACH_COMPONENT
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 23))
def test_finding_known_components(component, seed, count):
    draw, shape = torch.Generator().manual_seed(seed), (3, 4, 2) if component is WEIGHTS else (3, 8)
    members = torch.zeros(24, dtype=torch.bool)
    members[torch.randperm(24, generator=draw)[:count]] = True
    gold = Neurons(members.view(shape)) if component is NEURONS else ComponentSet(members.view(shape), component)
    scores = torch.randint(4, shape, generator=draw).float()
    pairs = [(a, b) for a in scores[gold.members].tolist() for b in scores[~gold.members].tolist()]
    expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    assert auroc(scores, gold) == pytest.approx(expected)

    precisions = []
    for value in scores[gold.members].tolist():
        above = scores >= value
        precisions.append((above & gold.members).sum().item() / above.sum().item())
    assert average_precision(scores, gold) == pytest.approx(sum(precisions) / count)

    for scope, ratio in (("layer", 0.25), ("layer", 0.5), ("global", 0.25), ("global", 1.0)):
        options = dict(ratio=ratio, scope=scope, rounding="nearest", component=component)
        found = top_components(scores, **options)
        inside = set(found.indices()) & set(gold.indices())
        assert recall(gold, found) == pytest.approx(100 * len(inside) / count)
        ceiling = recall_ceiling(gold, ratio, scope)
        assert recall(gold, top_components(gold.members.float(), **options)) == ceiling >= recall(gold, found)


@EACH_COMPONENT
@pytest.mark.parametrize("value", [0, 1])
def test_without_ground_truth_or_others_there_is_nothing_to_find(component, value):
    shape = (2, 3, 1) if component is WEIGHTS else (2, 3)
    members = torch.full(shape, value, dtype=torch.bool)
    gold = Neurons(members) if component is NEURONS else ComponentSet(members, component)
    message = f"{6 * value} of 6 {component.plural} are the ground truth; there must be some, and others"
    for metric in (auroc, average_precision):
        with pytest.raises(ValueError, match=message):
            metric(torch.rand(shape), gold)
    for metric in (lambda: recall(gold, gold), lambda: recall_ceiling(gold, 0.5)):
        with pytest.raises(ValueError, match=message):
            metric()


def test_scores_and_predictions_that_do_not_fit_are_refused(gpt2):
    gold, heads = some_of(gpt2), some_of(gpt2, HEADS, share=0.5)
    with pytest.raises(
        ValueError, match=r"scores of shape \[3, 5\] do not fit <.* of 384 neurons .*> of shape \[3, 128\]"
    ):
        auroc(torch.rand(3, 5), gold)
    with pytest.raises(ValueError, match="sets of different kind or shape do not mix"):
        recall(gold, heads)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_metrics_act_under_ablations_of_every_component(any_model, batch):
    for component in COMPONENTS.values():
        components = some_of(any_model, component, share=0.4)
        masks = {component.name: (~components.members).double()}
        with ablate(any_model, components):
            predictions, losses = (metric(any_model, SEQUENCES, batch) for metric in (teacher_forced, suffix_loss))
        for predicted, loss, sequence in zip(predictions, losses, SEQUENCES, strict=True):
            logits = naive.masked_logits(any_model, sequence.tokens[None], masks)[0]
            assert predicted.tolist() == logits.argmax(-1)[sequence.prompt_len - 1 : -1].tolist()
            assert loss.item() == pytest.approx(naive.suffix_loss(any_model, sequence, masks=masks).item(), rel=1e-5)


def test_sequences_and_rows_that_the_model_cannot_read_are_refused(gpt2):
    long, unknown = random_sequence(length=41), MemorizedSequence([1, 97], 1)
    for metric in (teacher_forced, free_running, suffix_loss, mean_activations):
        with pytest.raises(ValueError, match="has 41 tokens, and the model reads at most 40"):
            metric(gpt2, [SEQUENCES[0], long])
        with pytest.raises(ValueError, match="the model knows 0 to 96"):
            metric(gpt2, [SEQUENCES[0], unknown])
    for metric in (perplexity, row_losses):
        with pytest.raises(ValueError, match="has 41 tokens, and the model reads at most 40"):
            metric(gpt2, long.tokens[None])
        with pytest.raises(ValueError, match="the model knows 0 to 96"):
            metric(gpt2, unknown.tokens[None])


def test_no_sequences_have_no_predictions(gpt2):
    for metric in (teacher_forced, free_running):
        assert metric(gpt2, []) == []
    assert suffix_loss(gpt2, []).shape == (0,)
