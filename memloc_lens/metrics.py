"""What a model recalls of a sequence, how well it predicts other text, and how well scores find known neurons.

Predictions come first, `teacher_forced` or `free_running`; `suffix_accuracy` and `text_distance` then compare
them with the truth. These functions act under whatever ablation is open. `recall` and what follows it need no
model: they compare scores, or the neurons chosen by them, with the gold set of an injection.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from rapidfuzz.distance import Levenshtein
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from transformer_lens import HookedTransformer

from memloc_lens.forward import final_residual, target_logits, target_loss
from memloc_lens.memory import rows_at_once
from memloc_lens.models import generates_with_cache
from memloc_lens.neurons import Neurons, neurons_taken
from memloc_lens.sequence import MemorizedSequence, decode, equal_length_batches

Predictions = list[Int[Tensor, " suffix"]]
"""For each sequence the suffix that the model predicts, on the CPU."""


@torch.no_grad()
def teacher_forced(model: HookedTransformer, sequences: Sequence[MemorizedSequence], batch: int = 16) -> Predictions:
    """The likeliest token at every target position, given all true tokens before it.

    Args:
        model: used as it is, ablated or not.
        sequences: of any lengths.
        batch: sequences at a time, at the most.
    """
    predictions: Predictions = [torch.empty(0, dtype=torch.long)] * len(sequences)
    for places, tokens, prompt_len in equal_length_batches(sequences, _rows(model, sequences, batch)):
        logits = target_logits(model, final_residual(model, tokens, prompt_len))
        for place, predicted in zip(places, logits.argmax(dim=-1).cpu(), strict=True):
            predictions[place] = predicted
    return predictions


@torch.no_grad()
def free_running(model: HookedTransformer, sequences: Sequence[MemorizedSequence], batch: int = 16) -> Predictions:
    """The greedy continuation of each prompt, as long as the true suffix.

    Args:
        model: used as it is, ablated or not.
        sequences: of any lengths.
        batch: sequences at a time, at the most.
    """
    predictions: Predictions = [torch.empty(0, dtype=torch.long)] * len(sequences)
    for places, tokens, prompt_len in equal_length_batches(sequences, _rows(model, sequences, batch)):
        generated = model.generate(
            tokens[:, :prompt_len].to(model.cfg.device),
            max_new_tokens=tokens.shape[1] - prompt_len,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=generates_with_cache(model),
            prepend_bos=False,
            verbose=False,
        )
        for place, predicted in zip(places, generated[:, prompt_len:].cpu(), strict=True):
            predictions[place] = predicted
    return predictions


def _rows(model: HookedTransformer, sequences: Sequence[MemorizedSequence], batch: int) -> int:
    """As many sequences at a time as memory has room for, and `batch` at the most."""
    length = max((len(sequence.tokens) for sequence in sequences), default=1)
    return min(batch, rows_at_once(model, length, length))


def suffix_accuracy(predictions: Predictions, sequences: Sequence[MemorizedSequence]) -> Float[Tensor, " sequence"]:
    """The share of each suffix that is predicted right, token by token, in points (0 to 100)."""
    pairs = zip(predictions, sequences, strict=True)
    return torch.tensor(
        [100 * (predicted == sequence.suffix.cpu()).float().mean().item() for predicted, sequence in pairs]
    )


def text_distance(
    model: HookedTransformer, predictions: Predictions, sequences: Sequence[MemorizedSequence]
) -> Float[Tensor, " sequence"]:
    """Levenshtein distance, in characters, from each text to its prompt with the predicted suffix.

    Raises:
        ValueError: if the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("distances count characters, and the model has no tokenizer to write them with")
    distances = []
    for predicted, sequence in zip(predictions, sequences, strict=True):
        prompt = sequence.tokens[: sequence.prompt_len].cpu()
        distances.append(Levenshtein.distance(sequence.text(model), decode(model, torch.cat([prompt, predicted]))))
    return torch.tensor(distances, dtype=torch.float32)


@torch.no_grad()
def suffix_loss(
    model: HookedTransformer, sequences: Sequence[MemorizedSequence], batch: int = 16
) -> Float[Tensor, " sequence"]:
    """Mean of -log p(token | all before it) over each suffix, in nats."""
    losses = torch.zeros(len(sequences))
    for places, tokens, prompt_len in equal_length_batches(sequences, _rows(model, sequences, batch)):
        losses[places] = target_loss(model, final_residual(model, tokens, prompt_len), tokens, prompt_len).cpu()
    return losses


def perplexity(model: HookedTransformer, rows: Int[Tensor, "row pos"], batch: int = 16) -> float:
    """exp of the mean negative log-likelihood (nats) over all tokens of the rows but each row's first.

    The released code of Chang et al. (2024) reports 2 to the power of the same mean.

    Args:
        model: used as it is, ablated or not.
        rows: text the model is not meant to know by heart; see `text_rows`.
        batch: rows at a time, at the most.
    """
    return math.exp(row_losses(model, rows, batch).mean().item())


@torch.no_grad()
def row_losses(model: HookedTransformer, rows: Int[Tensor, "row pos"], batch: int = 16) -> Float[Tensor, " row"]:
    """The mean negative log-likelihood (nats) of each row, over all its tokens but the first."""
    size = min(batch, rows_at_once(model, rows.shape[1], rows.shape[1]))
    losses = [target_loss(model, final_residual(model, part, 1), part, 1) for part in rows.split(size)]
    return torch.cat(losses).double().cpu()


def text_rows(model: HookedTransformer, texts: Sequence[str], tokens: int, length: int = 128) -> Int[Tensor, "row pos"]:
    """The first `tokens` tokens of the texts, end to end, in rows of equal length.

    Args:
        model: whose tokenizer reads the texts; an end-of-text token stands between two texts.
        texts: at least one row's worth.
        tokens: wanted in all.
        length: of a row, lowered to what the model reads.

    Raises:
        ValueError: if the model has no tokenizer, or the texts fill no row.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer to read texts with")
    length = min(length, model.cfg.n_ctx)
    stream: list[int] = []
    for text in texts:
        if len(stream) >= tokens:
            break
        stream += model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream.append(model.tokenizer.eos_token_id)
    rows = min(len(stream), tokens) // length
    if rows == 0:
        raise ValueError(f"{min(len(stream), tokens)} tokens of text do not fill one row of {length}; give more text")
    return torch.tensor(stream[: rows * length]).view(rows, length)


def recall(gold: Neurons, predicted: Neurons) -> float:
    """The share of the gold neurons that are among the predicted, in points (Chang et al., 2024, eq. 4).

    Raises:
        ValueError: if there is no gold neuron, or the sets are of models of different shape.
    """
    return 100 * len(gold & predicted) / _count(gold)


def recall_ceiling(gold: Neurons, ratio: float, scope: Literal["layer", "global"] = "layer") -> float:
    """The recall of perfect scores when `top_neurons` takes a share of the neurons, in points.

    Gold neurons are drawn across all layers, so that some layers have more of them than their share: at a ratio
    equal to that of the injection even perfect scores miss some of these.

    Args:
        gold: at least one neuron.
        ratio: share that is taken, to the nearest number.
        scope: the share of every layer, or of all layers together.
    """
    in_layers = gold.members.sum(dim=1) if scope == "layer" else gold.members.sum().view(1)
    taken = neurons_taken(ratio, gold.members.numel() // len(in_layers), "nearest")
    return 100 * in_layers.clamp(max=taken).sum().item() / _count(gold)


def auroc(scores: Float[Tensor, "layer neuron"], gold: Neurons) -> float:
    """The probability that a gold neuron scores above another, in [0, 1]; 0.5 is chance, and a tie counts half."""
    _count(gold)
    return float(roc_auc_score(gold.members.flatten().cpu(), scores.flatten().cpu()))


def average_precision(scores: Float[Tensor, "layer neuron"], gold: Neurons) -> float:
    """Precision at each gold neuron's score, averaged over them, in [0, 1]; chance is the gold share."""
    _count(gold)
    return float(average_precision_score(gold.members.flatten().cpu(), scores.flatten().cpu()))


def _count(gold: Neurons) -> int:
    if not 0 < len(gold) < gold.members.numel():
        raise ValueError(f"{len(gold)} of {gold.members.numel()} neurons are gold; there must be some, and others")
    return len(gold)
