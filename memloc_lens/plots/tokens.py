"""A sequence as coloured tokens: where switching neurons off makes it forget."""

import html

import torch
from circuitsvis.tokens import colored_tokens
from jaxtyping import Float
from torch import Tensor

from memloc_lens.ablation import ablate
from memloc_lens.components import Neurons
from memloc_lens.library_types import HookedModel
from memloc_lens.runs.visible import visible
from memloc_lens.sequence import MemorizedSequence, decode


@torch.no_grad()
def token_losses(model: HookedModel, sequence: MemorizedSequence) -> Float[Tensor, " pos"]:
    """-log p(token | all before it) of every token, in nats, under whatever ablation is open; 0 for the first."""
    tokens = sequence.tokens.to(model.cfg.device)
    log_probs = model(tokens[None], return_type="logits")[0].float().log_softmax(dim=-1)
    losses = -log_probs[:-1].gather(1, tokens[1:, None].to(log_probs.device))[:, 0]
    return torch.cat([losses.new_zeros(1), losses])


def forgetting_page(model: HookedModel, sequence: MemorizedSequence, neurons: Neurons) -> str:
    """Colour each token by how much its loss rises when the neurons are zeroed.

    Args:
        model: with a tokenizer.
        sequence: to be shown, prompt and suffix.
        neurons: to be zeroed at every position.

    Returns:
        HTML that needs nothing from the network, about 1 MB: show it with `IPython.display.HTML`, or write it to a
        file. Hovering over a token gives its rise in nats.

    Raises:
        ValueError: if the model has no tokenizer.

    Example:
        >>> neurons = top_neurons(Activations()(model, sequence), ratio=0.05, first_layer=1)
        >>> page = forgetting_page(model, sequence, neurons)
        >>> written = Path("forgetting.html").write_text(page)
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer to write the tokens with")
    before = token_losses(model, sequence)
    with ablate(model, neurons):
        after = token_losses(model, sequence)
    # circuitsvis parses each token as HTML; it draws line breaks, and other blanks as blanks
    texts = [html.escape(visible(decode(model, token[None]), keep="\n\t"), quote=False) for token in sequence.tokens]
    return colored_tokens(texts, (after - before).cpu()).local_src
