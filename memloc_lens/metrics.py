"""Metrics: how much of a sequence a model recites, how well it predicts other text, how well scores find components.

Predictions come first, `teacher_forced` or `free_running`; `suffix_accuracy` and `text_distance` then compare them with
the true suffix. These functions act under any ablation that is open. `recall` and the functions after it need no
model: they compare scores, or the components chosen by them, with the ground truth of an injection.
"""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Float, Int
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from memloc_lens.checks import check_choice, check_model, check_tensor, described
from memloc_lens.components import ComponentSet, Scope, count_of
from memloc_lens.forward import PrefixCache, final_residual
from memloc_lens.generation import Predictions, free_running, rows_for
from memloc_lens.isolation import isolated
from memloc_lens.library_types import HookedModel
from memloc_lens.logits import target_logits, target_loss, target_losses
from memloc_lens.memory import rows_at_once
from memloc_lens.sequence import (
    Batch,
    MemorizedSequence,
    begins_with_bos,
    check_sequences,
    decode,
    equal_length_batches,
)

__all__ = [
    "Predictions",
    "auroc",
    "average_precision",
    "free_running",
    "perplexity",
    "recall",
    "recall_ceiling",
    "row_losses",
    "suffix_accuracy",
    "suffix_loss",
    "suffix_probabilities",
    "teacher_forced",
    "text_distance",
    "text_rows",
]


@torch.no_grad()
def teacher_forced(
    model: HookedModel,
    sequences: Sequence[MemorizedSequence],
    batch: int = 16,
    prefix: PrefixCache | None = None,
) -> Predictions:
    """Return the most probable token at every target position, given all true tokens before it.

    Args:
        model: used as it is, ablated or not.
        sequences: of any lengths.
        batch: maximum number of sequences at a time.
        prefix: cache of the layers before the first ablated one.

    Example:
        >>> suffix_accuracy(teacher_forced(model, [sequence]), [sequence])
        tensor([100.])
    """
    model = check_model(model)
    sequences = check_sequences(model, sequences)
    predictions: Predictions = [torch.empty(0, dtype=torch.long, device="cpu")] * len(sequences)
    with isolated(model):
        for indices, group in equal_length_batches(sequences, rows_for(model, sequences, batch)):
            logits = target_logits(model, final_residual(model, group, prefix), group)
            for index, predicted in zip(indices, logits.argmax(dim=-1).cpu(), strict=True):
                predictions[index] = predicted
    return predictions


def suffix_accuracy(predictions: Predictions, sequences: Sequence[MemorizedSequence]) -> Float[Tensor, " sequence"]:
    """Return the share of the tokens of each suffix that are predicted right, in points (0 to 100)."""
    pairs = zip(predictions, sequences, strict=True)
    shares = [100 * (predicted == sequence.suffix.cpu()).float().mean().item() for predicted, sequence in pairs]
    return torch.tensor(shares, dtype=torch.float32, device="cpu")


def text_distance(
    model: HookedModel, predictions: Predictions, sequences: Sequence[MemorizedSequence]
) -> Float[Tensor, " sequence"]:
    """Return the Levenshtein distance, in characters, from each text to its prompt with the predicted suffix.

    Raises:
        ValueError: if the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("distances count characters, and the model has no tokenizer to write them with")
    distances = []
    for predicted, sequence in zip(predictions, sequences, strict=True):
        prompt = sequence.tokens[: sequence.prompt_len].cpu()
        distances.append(Levenshtein.distance(sequence.text(model), decode(model, torch.cat([prompt, predicted]))))
    return torch.tensor(distances, dtype=torch.float32, device="cpu")


@torch.no_grad()
def suffix_loss(
    model: HookedModel, sequences: Sequence[MemorizedSequence], batch: int = 16
) -> Float[Tensor, " sequence"]:
    """Return the mean of -log p(token | all before it) over each suffix, in nats.

    They are in float32; of a model in float64 they are in float64.

    Example:
        >>> suffix_loss(model, [sequence]).shape
        torch.Size([1])
    """
    model = check_model(model)
    sequences = check_sequences(model, sequences)
    losses = torch.zeros(len(sequences), dtype=torch.float64, device="cpu")
    with isolated(model):
        for indices, group in equal_length_batches(sequences, rows_for(model, sequences, batch)):
            losses[indices] = target_loss(model, final_residual(model, group), group).double().cpu()
    return losses if model.cfg.dtype == torch.float64 else losses.float()


@torch.no_grad()
def suffix_probabilities(
    model: HookedModel, sequence: MemorizedSequence, prefix: PrefixCache | None = None
) -> Float[Tensor, " suffix"]:
    """Return p(token | all before it) of every token of the suffix, on the CPU.

    Args:
        model: used as it is, ablated or not.
        sequence: prompt and suffix.
        prefix: cache of the layers before the first ablated one.

    Example:
        >>> suffix_probabilities(model, sequence).shape
        torch.Size([48])
    """
    model = check_model(model)
    (sequence,) = check_sequences(model, [sequence])
    batch = Batch(sequence.tokens[None], sequence.prompt_len)
    with isolated(model):
        return target_losses(model, final_residual(model, batch, prefix), batch)[0].neg().exp().cpu()


def perplexity(
    model: HookedModel, rows: Int[Tensor, "row pos"], batch: int = 16, prefix: PrefixCache | None = None
) -> float:
    """Return exp of the mean negative log-likelihood (nats) over all tokens of the rows but each row's first.

    The released code of Chang et al. (2024) reports 2 to the power of the same mean.

    Args:
        model: used as it is, ablated or not.
        rows: text that the model should not have memorized; see `text_rows`.
        batch: maximum number of rows at a time.
        prefix: cache of the layers before the first ablated one.

    Example:
        >>> perplexity(model, text_rows(model, ["Return the number of items in the list. " * 8], 64, 32)) > 1
        True
    """
    return math.exp(row_losses(model, rows, batch, prefix).mean().item())


@torch.no_grad()
def row_losses(
    model: HookedModel, rows: Int[Tensor, "row pos"], batch: int = 16, prefix: PrefixCache | None = None
) -> Float[Tensor, " row"]:
    """Return the mean negative log-likelihood (nats) of each row, over all its tokens but the first."""
    model = check_model(model)
    check_tensor("rows", rows, "row, pos")
    texts = check_sequences(model, [MemorizedSequence(row, prompt_len=1) for row in rows])
    rows = torch.stack([text.tokens for text in texts])
    size = min(batch, rows_at_once(model, rows.shape[1], rows.shape[1]))
    parts = [Batch(part, prompt_len=1) for part in rows.split(size)]
    with isolated(model):
        losses = [target_loss(model, final_residual(model, part, prefix), part) for part in parts]
    return torch.cat(losses).double().cpu()


def text_rows(
    model: HookedModel, texts: Sequence[str], tokens: int, length: int = 128, bos: bool | None = None
) -> Int[Tensor, "row pos"]:
    """Return the first tokens of the texts, joined and cut into rows of equal length.

    Args:
        model: whose tokenizer reads the texts. An end-of-text token separates two texts, if the tokenizer has one.
        texts: enough for at least one row.
        tokens: total number of tokens.
        length: of a row, at most what the model reads.
        bos: begin every row with a beginning-of-sequence token. Default: what the tokenizer is configured to do.

    Raises:
        ValueError: if the model has no tokenizer, or none with such a token, or the texts fill no row.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer to read texts with")
    first = [model.tokenizer.bos_token_id] if begins_with_bos(model, bos) else []
    own = min(length, model.cfg.n_ctx) - len(first)
    stream: list[int] = []
    separator = [] if model.tokenizer.eos_token_id is None else [model.tokenizer.eos_token_id]
    for text in texts:
        if len(stream) >= tokens:
            break
        stream += model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
    rows = min(tokens // (own + len(first)), len(stream) // own)
    if rows == 0:
        raise ValueError(
            f"{min(len(stream), tokens)} tokens of text do not fill one row of {own + len(first)}; give more text"
        )
    cut = torch.tensor(stream[: rows * own], device="cpu").view(rows, own)
    return torch.cat([torch.tensor(first, dtype=torch.long, device="cpu").expand(rows, -1), cut], dim=1)


def recall(gold: ComponentSet, predicted: ComponentSet) -> float:
    """Return the share of the ground truth that is among the predicted components, in points (eq. 4 of the paper).

    Raises:
        ValueError: if the ground truth is empty or everything, or the sets are of different kind or shape.
    """
    count = _count(gold)
    return 100 * len(gold & predicted) / count


def recall_ceiling(gold: ComponentSet, ratio: float, scope: Scope = "layer") -> float:
    """Return the recall of perfect scores when a share of the components is predicted, in points.

    The ground truth is drawn across all layers, so that some layers hold more of it than their share: at the ratio of
    the injection even perfect scores miss some of these.

    Args:
        gold: the ground truth, at least one component.
        ratio: share that is predicted, to the nearest number.
        scope: take the share of every layer, or of all layers together.
    """
    check_choice("scope", scope, get_args(Scope))
    count = _count(gold)
    found = gold.counts() if scope == "layer" else [count]
    total = math.prod(gold.shape)
    taken = count_of(ratio, total // len(found), "nearest", gold.component.plural)
    return 100 * sum(min(there, taken) for there in found) / count


def auroc(scores: Float[Tensor, " layer *unit"], gold: ComponentSet) -> float:
    """Return the probability that a component of the ground truth scores above another one.

    In [0, 1]; 0.5 is chance, and a tie counts half.
    """
    from sklearn.metrics import roc_auc_score

    _check_scores(scores, gold)
    return float(roc_auc_score(gold.members.flatten().cpu(), scores.flatten().cpu()))


def average_precision(scores: Float[Tensor, " layer *unit"], gold: ComponentSet) -> float:
    """Return the precision at the score of each component of the ground truth, averaged over them.

    In [0, 1]; chance is the share of the ground truth.
    """
    from sklearn.metrics import average_precision_score

    _check_scores(scores, gold)
    return float(average_precision_score(gold.members.flatten().cpu(), scores.flatten().cpu()))


def _check_scores(scores: Tensor, gold: ComponentSet) -> None:
    _count(gold)
    check_tensor("scores", scores, gold.component.axes.replace(" ", ", "))
    if tuple(scores.shape) != gold.shape:
        raise ValueError(f"scores of shape {list(scores.shape)} do not fit {gold!r} of shape {list(gold.shape)}")


def _count(gold: ComponentSet) -> int:
    if not isinstance(gold, ComponentSet):
        raise ValueError(f"the ground truth is {described(gold)}; give a set, such as inject(...) draws")
    total = math.prod(gold.shape)
    if not 0 < len(gold) < total:
        raise ValueError(
            f"{len(gold)} of {total} {gold.component.plural} are the ground truth; there must be some, and others"
        )
    return len(gold)
