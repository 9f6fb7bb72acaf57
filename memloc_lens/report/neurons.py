"""Cards of the neurons that a DEL run has located most often: where they fire, and what they write."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from memloc_lens.benchmarks.context import HELD_OUT
from memloc_lens.benchmarks.finished_del import located_sets, targets_of
from memloc_lens.components import NEURONS, post
from memloc_lens.data import load_texts
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.baselines import output_norms
from memloc_lens.metrics import text_rows
from memloc_lens.report.cards import label
from memloc_lens.runs.finished import FinishedRun
from memloc_lens.runs.visible import visible
from memloc_lens.sequence import MemorizedSequence, decode

BASELINES = ("random", "weight-norm")
"""Methods that read no text: what they name is not counted."""
TEXT_TOKENS = 1024
FIRINGS, PROMOTED, AROUND = 5, 8, 6
MASSIVE = 100
"""How many times its layer's median a neuron must write on the first token to be called massive."""


@dataclass(frozen=True)
class Firing:
    """A token on which a neuron fires, the text around it, and the activation there."""

    before: str
    token: str
    after: str
    activation: float
    where: str


@dataclass
class NeuronCard:
    """What a neuron does.

    Args:
        layer: index of its layer.
        neuron: its index in the layer.
        named: ids of the sequences that it was located for, by method.
        norm: Euclidean norm of its row of `W_out`.
        norm_percentile: percent of the neurons of its layer with a smaller one.
        first_token: how many times the median of its layer it writes on the first token.
        firings: tokens on which it fires most.
        raised: tokens whose logits its row of `W_out` raises most.
        lowered: tokens whose logits it lowers most.
    """

    layer: int
    neuron: int
    named: dict[str, list[str]]
    norm: float = 0.0
    norm_percentile: float = 0.0
    first_token: float = 0.0
    firings: list[Firing] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    lowered: list[str] = field(default_factory=list)

    @property
    def sequences(self) -> list[str]:
        """The ids of all sequences that it was located for."""
        return list(dict.fromkeys(id for ids in self.named.values() for id in ids))

    @property
    def massive(self) -> bool:
        """Whether it is one of the massive activations on the first token."""
        return self.first_token >= MASSIVE


def neuron_cards(
    run: FinishedRun, model: HookedModel, ratio: float, count: int = 24, text: Path | None = None
) -> list[NeuronCard]:
    """Return what the neurons do that most methods and targets of a run name.

    Args:
        run: of DEL on neurons.
        model: of the run.
        ratio: of the run.
        count: number of neurons.
        text: other text to look for tokens on which they fire. Default: held-out text of the embedded model.

    Returns:
        The neurons by the number of methods and sequences that name them.
    """
    targets = targets_of(run, model, ratio)
    cards = _most_named(run, targets, ratio, count)
    rows: list[MemorizedSequence] = []
    if model.tokenizer is not None:
        lines = text_rows(model, load_texts(text or HELD_OUT), TEXT_TOKENS, bos=run.config.get("bos"))
        rows = [MemorizedSequence(line, 1, "other text") for line in lines]
    _tell_norms(model, cards)
    _tell_promoted(model, cards)
    _tell_firings(model, cards, [*targets, *rows])
    return cards


def _most_named(run: FinishedRun, targets: Sequence[MemorizedSequence], ratio: float, count: int) -> list[NeuronCard]:
    named: dict[tuple[int, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for method in run.methods:
        if method not in BASELINES:
            for target, members in zip(targets, located_sets(run, method, ratio, len(targets)), strict=True):
                for index in members.indices():
                    named[index][method].append(label(target.id))
    often = sorted(named, key=lambda index: (-sum(map(len, named[index].values())), index))
    return [NeuronCard(layer, neuron, dict(named[layer, neuron])) for layer, neuron in often[:count]]


def _tell_norms(model: HookedModel, cards: list[NeuronCard]) -> None:
    norms = output_norms(model, NEURONS)
    for card in cards:
        own = norms[card.layer, card.neuron]
        card.norm, card.norm_percentile = own.item(), 100 * (norms[card.layer] < own).float().mean().item()


@torch.no_grad()
def _tell_promoted(model: HookedModel, cards: list[NeuronCard]) -> None:
    """Tell which tokens a row of `W_out` raises and lowers through the unembedding (logit lens)."""
    for card in cards:
        logits = model.blocks[card.layer].mlp.W_out[card.neuron].float().to(model.W_U.device) @ model.W_U.float()
        for texts, sign in ((card.raised, 1), (card.lowered, -1)):
            texts += [_text(model, token[None]) for token in (sign * logits).topk(PROMOTED).indices]


@torch.no_grad()
def _tell_firings(model: HookedModel, cards: list[NeuronCard], sequences: list[MemorizedSequence]) -> None:
    layers = sorted({card.layer for card in cards})
    found: list[list[tuple[float, int, int]]] = [[] for _ in cards]
    first, typical = [torch.zeros(len(cards)) for _ in range(2)]
    norms = output_norms(model, NEURONS).cpu()
    for index, sequence in enumerate(sequences):
        activations = _activations(model, sequence, layers)
        for place, card in enumerate(cards):
            own = activations[card.layer][:, card.neuron]
            top = own.topk(min(FIRINGS, len(own)))
            found[place] += [(value, index, at) for value, at in zip(*map(torch.Tensor.tolist, top), strict=True)]
            written = activations[card.layer][1:].abs() * norms[card.layer]
            first[place] += own[0].abs() * norms[card.layer, card.neuron]
            typical[place] += written.median()
    for place, card in enumerate(cards):
        card.first_token = (first[place] / typical[place].clamp(min=torch.finfo(torch.float32).tiny)).item()
        most = sorted(found[place], reverse=True)[:FIRINGS]
        card.firings = [_firing(model, sequences[index], at, value) for value, index, at in most]


def _activations(
    model: HookedModel, sequence: MemorizedSequence, layers: list[int]
) -> dict[int, Float[Tensor, "pos neuron"]]:
    names = {layer: post(layer) for layer in layers}
    tokens = sequence.tokens[None].to(model.cfg.device)
    _, cache = model.run_with_cache(tokens, return_type=None, names_filter=list(names.values()))
    return {layer: cache[name][0].float().cpu() for layer, name in names.items()}


def _firing(model: HookedModel, sequence: MemorizedSequence, at: int, activation: float) -> Firing:
    tokens = sequence.tokens
    return Firing(
        _text(model, tokens[max(0, at - AROUND) : at]),
        _text(model, tokens[at : at + 1]),
        _text(model, tokens[at + 1 : at + 1 + AROUND]),
        activation,
        label(sequence.id),
    )


def _text(model: HookedModel, tokens: Tensor) -> str:
    if model.tokenizer is None:
        return "".join(f"{token} " for token in tokens.tolist())
    return visible(decode(model, tokens)) if len(tokens) else ""
