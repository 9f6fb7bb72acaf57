import json
import re

import naive
import pytest
import torch

from memloc_lens import MemorizedSequence, Neurons, load_sequences
from memloc_lens.report.tokens import forgetting_page, token_losses


def test_losses_of_each_token(any_model, sequence):
    losses = token_losses(any_model, sequence)
    assert losses[0] == 0
    for place in range(1, len(sequence.tokens)):
        alone = MemorizedSequence(sequence.tokens[: place + 1], place)
        assert losses[place].item() == pytest.approx(naive.suffix_loss(any_model, alone).item(), rel=1e-4)


def test_the_page_holds_tokens_and_rises(embedded):
    sequence = load_sequences(embedded)[0]
    neurons = Neurons(torch.ones(embedded.cfg.n_layers, embedded.cfg.d_mlp, dtype=torch.bool))
    page = forgetting_page(embedded, sequence, neurons)
    props = json.loads(re.search(r"ColoredTokens,\s*(\{.*?\})\s*\)", page, re.DOTALL).group(1))
    assert "".join(props["tokens"]) == sequence.text(embedded)
    assert len(props["values"]) == len(sequence.tokens)
    assert sum(props["values"]) > 48


def test_a_token_cannot_break_out_of_the_page(embedded):
    sequence = MemorizedSequence.from_text(embedded, "x </script><b> y", prompt_len=1)
    neurons = Neurons(torch.zeros(embedded.cfg.n_layers, embedded.cfg.d_mlp, dtype=torch.bool))
    page = forgetting_page(embedded, sequence, neurons)
    assert "\\u003c" in page
    assert "<b>" not in page.split("ColoredTokens,")[-1]


def test_a_model_without_a_tokenizer(gpt2, sequence):
    with pytest.raises(ValueError, match="no tokenizer"):
        forgetting_page(gpt2, sequence, Neurons(torch.zeros(3, 128, dtype=torch.bool)))
