"""What all localizers share: the way from sequences to batches, and back to scores."""

import re
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memloc_lens.bridge import has_forward_hooks
from memloc_lens.checks import check_first_layer, check_model, in_one_line
from memloc_lens.components import NEURONS, Component
from memloc_lens.forward import frozen
from memloc_lens.library_types import HookedModel
from memloc_lens.memory import in_chunks, rows_at_once
from memloc_lens.sequence import Batch, MemorizedSequence, check_sequences, equal_length_batches

ScoreBatch = Callable[[HookedModel, Batch], Float[Tensor, "row layer *unit"]]


@runtime_checkable
class Localizer(Protocol):
    """A method that scores how responsible every component is for the memorization of a sequence.

    Every localizer of the package is a frozen dataclass: its fields are its settings. Fields with the names
    `first_layer` and `component` are set by the benchmarks.
    """

    name: ClassVar[str]
    """Of the method on the command line and in records."""

    def __call__(
        self, model: HookedModel, sequences: MemorizedSequence | Sequence[MemorizedSequence], /
    ) -> Float[Tensor, "*sequence layer unit"]:
        """Return scores [layer, *unit] of one sequence, or [sequence, layer, *unit] of a list."""
        ...


AnyLocalizer = Callable[..., Tensor]
"""A `Localizer` of the package, or whatever else scores sequences: an object or a function, with or without a name."""


def name_of(localizer: AnyLocalizer) -> str:
    """Return the name of a method in records: its `name`, or its class or function name with hyphens.

    Example:
        >>> name_of(HardConcrete())
        'hard-concrete'
    """
    own = getattr(localizer, "name", None) or getattr(localizer, "__name__", type(localizer).__name__)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", str(own)).replace("_", "-").lower()


def score(
    model: HookedModel,
    sequences: MemorizedSequence | Sequence[MemorizedSequence],
    score_batch: ScoreBatch,
    component: Component = NEURONS,
    *,
    first_layer: int = 0,
    graph_layers: int = 0,
    rows_each: int = 1,
    parameters: int = 0,
) -> Float[Tensor, "..."]:
    """Score one sequence, or many: sequences of equal length go through `score_batch` together.

    Args:
        model: left exactly as found.
        sequences: one sequence gives [layer, *unit], a list gives [sequence, layer, *unit].
        score_batch: scores the rows of a batch.
        component: kind that the scores are about.
        first_layer: of the method; checked against the model.
        graph_layers: layers that the method runs with a graph for a backward pass.
        rows_each: copies of a sequence that it runs at once.
        parameters: that it trains for each sequence.

    Returns:
        Scores in float32, on the model's device.

    Raises:
        ValueError: if the list is empty, the model cannot read a sequence, or it has no layer `first_layer`.
    """
    model = check_model(model)
    listed = check_sequences(model, sequences)
    if not listed:
        raise ValueError("no sequence to localize was given")
    check_first_layer(first_layer, model.cfg.n_layers)
    device = torch.device(model.cfg.device)

    def score_group(group: Batch) -> Float[Tensor, "row layer *unit"]:
        rows = rows_at_once(model, group.length, group.suffix_len, graph_layers, parameters)
        return torch.cat(
            in_chunks(
                group.tokens,
                max(1, rows // rows_each),
                lambda tokens: score_batch(model, Batch(tokens.to(device), group.prompt_len)),
            )
        )

    with frozen(model):
        scores = torch.zeros(len(listed), *component.shape(model), device=device, dtype=torch.float32)
        if rows_each > 1:
            _check_copies_agree(model, listed[0].tokens.to(device))
        for indices, group in equal_length_batches(listed, len(listed)):
            scores[indices] = score_group(group).float()
    return scores[0] if isinstance(sequences, MemorizedSequence) else scores


@torch.no_grad()
def _check_copies_agree(model: HookedModel, tokens: Int[Tensor, " pos"]) -> None:
    """Refuse hooks that do not treat copies of a sequence in one batch as they treat the sequence alone."""
    parts = model.named_modules()
    name = next((name for name, part in parts if has_forward_hooks(part)), "")
    if not name:
        return
    alone = model(tokens[None], return_type="logits")
    try:
        copies = model(tokens.repeat(3, 1), return_type="logits")
        agree = bool((copies - alone).abs().max() <= 1e-3 * alone.abs().max())
    except Exception as error:
        raise ValueError(
            f"{name} has a hook that fails on a batch of copies of the sequence: {in_one_line(error)}"
        ) from error
    if not agree:
        raise ValueError(
            f"{name} has a hook that changes copies of the sequence in one batch in different ways, and this method "
            "runs many; let the hook treat all rows alike, or remove it"
        )
