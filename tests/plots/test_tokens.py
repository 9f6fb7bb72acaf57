import json
import re
from html.parser import HTMLParser

import naive
import pytest
import torch

from memloc_lens import MemorizedSequence, Neurons, load_sequences
from memloc_lens.plots import tokens
from memloc_lens.plots.tokens import forgetting_page, token_losses


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


class Parsed(HTMLParser):
    """What a browser makes of HTML: its text, and the tags that it holds."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.tags = "", []
        self.feed(source)
        self.close()

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    handle_endtag = handle_decl = handle_comment = handle_pi = lambda self, tag: self.tags.append(tag)


HOSTILE = {
    "<iframe/src=javascript:alert(1)>": None,
    "<br>": None,
    "</div>": None,
    "<!-- x": None,
    "<img src=x onerror=alert(1)>": None,
    "</script><b>": None,
    "&lt;": None,
    "&#60;": None,
    "\\u003cb>": None,
    "\ue000b>": None,
    "caf\u00e9 \u6f22": None,
    "a\tb\nc": None,
    "a\u202eb": "a\\u202eb",
    "a\u2028b": "a\\u2028b",
    "a\x00b": "a\\x00b",
    "\x1b[31m": "\\x1b[31m",
}
"""Texts of tokens, and what is to be seen of those that hold characters which cannot be seen."""


@pytest.mark.parametrize(("text", "seen"), HOSTILE.items(), ids=repr)
def test_a_token_is_shown_as_it_is_written(embedded, monkeypatch, text, seen):
    """A tokenizer file is enough to bring such tokens."""
    monkeypatch.setattr(tokens, "decode", lambda model, token: text)
    sequence = MemorizedSequence([5, 6], prompt_len=1)
    neurons = Neurons(torch.zeros(embedded.cfg.n_layers, embedded.cfg.d_mlp, dtype=torch.bool))
    page = forgetting_page(embedded, sequence, neurons)
    call = page.rsplit("ColoredTokens,", 1)[1]
    assert "<" not in call.split("</script>")[0]
    props = json.loads(re.search(r"\s*(\{.*?\})\s*\)", call, re.DOTALL).group(1))
    for token in props["tokens"]:
        parsed = Parsed(token)
        assert parsed.tags == []
        assert parsed.text == (seen or text)


def test_a_model_without_a_tokenizer(gpt2, sequence):
    with pytest.raises(ValueError, match="no tokenizer"):
        forgetting_page(gpt2, sequence, Neurons(torch.zeros(3, 128, dtype=torch.bool)))
