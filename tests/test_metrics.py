import math

import naive
import pytest
import torch
from conftest import random_sequence
from hypothesis import given
from hypothesis import strategies as st

from memloc_lens import MemorizedSequence, Neurons, top_neurons
from memloc_lens.metrics import (
    auroc,
    average_precision,
    free_running,
    perplexity,
    recall,
    recall_ceiling,
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


def test_text_rows(embedded):
    rows = text_rows(embedded, ["Return the number of items.", "Raise an error."] * 20, tokens=50, length=16)
    assert rows.shape == (3, 16)
    assert embedded.tokenizer.decode(rows.flatten().tolist()).startswith(
        "Return the number of items.<|endoftext|>Raise an"
    )
    with pytest.raises(ValueError, match="do not fill one row of 128"):
        text_rows(embedded, ["Return"], tokens=500)


@given(st.integers(0, 10**6), st.integers(1, 11))
def test_finding_known_neurons(seed, count):
    draw = torch.Generator().manual_seed(seed)
    members = torch.zeros(12, dtype=torch.bool)
    members[torch.randperm(12, generator=draw)[:count]] = True
    gold = Neurons(members.view(3, 4))
    scores = torch.randint(4, (3, 4), generator=draw).float()
    pairs = [(a, b) for a in scores[gold.members].tolist() for b in scores[~gold.members].tolist()]
    expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    assert auroc(scores, gold) == pytest.approx(expected)

    precisions = []
    for value in scores[gold.members].tolist():
        above = scores >= value
        precisions.append((above & gold.members).sum().item() / above.sum().item())
    assert average_precision(scores, gold) == pytest.approx(sum(precisions) / count)

    for scope, ratio in (("layer", 0.25), ("layer", 0.5), ("global", 0.25), ("global", 1.0)):
        ceiling = recall_ceiling(gold, ratio, scope)
        perfect = top_neurons(gold.members.float(), ratio, scope=scope, rounding="nearest")
        assert recall(gold, perfect) == ceiling
        assert recall(gold, top_neurons(scores, ratio, scope=scope, rounding="nearest")) <= ceiling


@pytest.mark.parametrize("members", [torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)])
def test_without_gold_or_others_there_is_nothing_to_find(members):
    with pytest.raises(ValueError, match="of 6 neurons are gold"):
        auroc(torch.rand(2, 3), Neurons(members))
