"""Extraction by variants of a prompt, against generation a token at a time and against sampling."""

import pytest
import torch
from tiny import VOCAB, tiny_model

from memloc_lens import ComponentSet, MemorizedSequence, ablate, load_sequences
from memloc_lens.erase.extraction import extraction, recitations
from memloc_lens.erase.variants import SURROUNDING, VARIANTS, shifted, typos


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def greedy(model, tokens, count):
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens[None])[0, -1].argmax()[None]])
    return tokens


def partly_recited(model, seed: int) -> MemorizedSequence:
    """A text of which the model recites some parts: its own continuation, with up to two tokens changed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = greedy(model, torch.randint(VOCAB, (4,), generator=generator), 5)
    for _ in range(seed % 3):
        place = 4 + int(torch.randint(5, (1,), generator=generator))
        tokens[place] = (tokens[place] + 1) % VOCAB
        tokens = torch.cat([tokens[: place + 1], greedy(model, tokens[: place + 1], 8 - place)[place + 1 :]])
    return MemorizedSequence(tokens, 4, id=f"partly-{seed}")


@torch.no_grad()
def test_against_generation_from_every_prefix(model):
    sequences = [partly_recited(model, seed) for seed in range(9)]
    prefixes, strengths = set(), set()
    for sequence, found in zip(sequences, recitations(model, sequences), strict=True):
        length, suffix = len(sequence.suffix), sequence.suffix.tolist()
        written = greedy(model, sequence.prompt[0], length)[4:].tolist()
        prefix = next((i for i in range(length) if written[i] != suffix[i]), length)
        given = next(
            k
            for k in range(length + 1)
            if greedy(model, sequence.tokens[: 4 + k], length - k).tolist() == sequence.tokens.tolist()
        )
        assert found.prefix == prefix
        assert found.strength == pytest.approx(1 - given / length)
        prefixes.add(prefix)
        strengths.add(given)
    assert len(prefixes) > 2
    assert len(strengths) > 2


@torch.no_grad()
def test_sampled_extraction_is_how_often_samples_hit(model):
    sequence = MemorizedSequence(greedy(model, torch.tensor([3, 1]), 2), 2)
    samples, draws = 3, 4000
    generator = torch.Generator().manual_seed(0)
    written = sequence.prompt.repeat(samples * draws, 1)
    for _ in range(2):
        chances = model(written)[:, -1].softmax(dim=-1)
        written = torch.cat([written, torch.multinomial(chances, 1, generator=generator)], dim=1)
    hits = (written == sequence.tokens).all(dim=1).view(draws, samples).any(dim=1).double().mean().item()
    (found,) = recitations(model, [sequence], samples=samples)
    assert 0.05 < hits < 0.95
    assert found.probability == pytest.approx(hits, abs=0.03)


def test_open_ablations_count(model):
    members = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    zeroed = tiny_model()
    for block, layer in zip(zeroed.blocks, members, strict=True):
        block.mlp.W_out.data[layer] = 0
    sequences = [partly_recited(model, seed) for seed in range(4)]
    with ablate(model, ComponentSet(members)):
        inside = extraction(model, sequences)
    assert inside != extraction(model, sequences)
    for name, expected in extraction(zeroed, sequences).items():
        for found, wanted in zip(inside[name], expected, strict=True):
            assert (found is None) == (wanted is None)
            assert found is None or vars(found) == pytest.approx(vars(wanted))


def test_variants_keep_the_suffix_and_change_the_prompt(embedded):
    sequences = load_sequences(embedded)[:3]
    for sequence in [*sequences, *(one.after_bos(embedded) for one in sequences)]:
        for name, vary in VARIANTS.items():
            varied = vary(embedded, sequence)
            assert torch.equal(varied.suffix, sequence.suffix[8 if name == "later" else 0 :])
            assert (name == "own") == torch.equal(varied.tokens, sequence.tokens)
            assert varied.id == sequence.id
            varied.check_fits(embedded)
            is_first = int(sequence.tokens[0]) == embedded.tokenizer.bos_token_id
            assert (int(varied.tokens[0]) == embedded.tokenizer.bos_token_id) == is_first


def test_variants_by_hand(embedded):
    sequence = MemorizedSequence.from_text(embedded, "Return the number of items in each list again", 7)
    prompt = embedded.to_string(sequence.prompt[0])
    texts = {name: embedded.to_string(vary(embedded, sequence).prompt[0]) for name, vary in VARIANTS.items()}
    assert texts["upper"] == prompt.upper()
    assert texts["lower"] == prompt.lower()
    assert texts["surrounded"] == SURROUNDING + prompt
    assert texts["typos"].split()[:4] == ["Reutrn", "the", "number", "of"]
    assert shifted(embedded, sequence).tokens.tolist() == sequence.tokens.tolist()[3:]


def test_a_long_prompt_keeps_its_end(embedded):
    words = "Return the number of items in the list " * 12
    sequence = MemorizedSequence.from_text(embedded, words, 90, bos=True)
    room = embedded.cfg.n_ctx - len(sequence.suffix)
    varied = VARIANTS["surrounded"](embedded, sequence)
    assert sequence.prompt_len < varied.prompt_len == room  # some of the other text is cut away
    assert varied.tokens[-len(sequence.tokens) + 1 :].tolist() == sequence.tokens.tolist()[1:]
    assert varied.tokens[0] == embedded.tokenizer.bos_token_id
    full = MemorizedSequence(torch.arange(embedded.cfg.n_ctx) % 50 + 5, 1)
    assert VARIANTS["surrounded"](embedded, full).prompt_len == 1


def test_without_a_tokenizer_there_are_no_text_variants(model):
    sequence = partly_recited(model, 0)
    found = extraction(model, [sequence, MemorizedSequence(sequence.tokens, 1)])
    assert {name for name, each in found.items() if each == [None, None]} == {"typos", "upper", "lower", "surrounded"}
    assert found["shifted"][0] is not None
    assert found["shifted"][1] is None
    assert typos(model, sequence) is None


def test_bad_input(model):
    with pytest.raises(ValueError, match="samples is 0"):
        recitations(model, [partly_recited(model, 0)], samples=0)
    with pytest.raises(ValueError, match="the model knows 0 to 30"):
        extraction(model, [MemorizedSequence([1, 50], 1)])
