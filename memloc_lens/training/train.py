"""Train the embedded model on the prose of the standard library: ``python -m memloc_lens.training.train --out FOLDER``.

The folder gets the model in transformers format (weights, configuration, tokenizer), `sequences.jsonl` (every passage
with its number of repeats), `held_out.jsonl` (text that training never sees) and `training.json` (recipe and loss
curve). The same seed gives the same weights on the same kind of machine, with the same versions of Python and torch.
``python -m memloc_lens.training.card --folder FOLDER`` then measures what the model memorized.
"""

import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypedDict, TypeVar

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from memloc_lens.checks import check_number
from memloc_lens.data.files import PROMPT_LEN
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.training.corpus import (
    END_OF_TEXT,
    Passage,
    choose_passages,
    read_chunks,
    split_held_out,
    train_tokenizer,
    training_rows,
)

ALPHABET = 256
"""Tokens of a byte-level vocabulary that are bytes."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights of the embedded model.

    Args:
        out: Folder of the model.
        seed: Seed of the initial weights, the choice of passages and the order of the rows.
        layers: Number of layers.
        width: Width of the residual stream.
        heads: Number of attention heads in a layer.
        vocab_size: Number of tokens in the vocabulary.
        context: Number of tokens in a training row, and in the longest input of the model.
        repeats: Numbers of times that passages are seen.
        per_count: Number of passages for each number of repeats.
        passage_length: Number of tokens in a passage.
        without: Ids of passages that are left out, such as "passage-011": their rows hold background instead, and all
            else is as it was. A model that was retrained without them is the reference of an erasure's audit.
        held_out_tokens: Minimum number of tokens of held-out text.
        steps: Number of training steps.
        batch: Number of rows in a step.
        lr: Peak learning rate of AdamW, reached after the warm-up and lowered by a cosine to a twentieth.
        warmup: Number of steps in which the learning rate rises.
        weight_decay: Weight decay of AdamW.
        threads: Number of CPU threads. Another number adds up in another order, and gives other weights.
    """

    out: Path
    seed: int = 0
    layers: int = 6
    width: int = 192
    heads: int = 6
    vocab_size: int = 4096
    context: int = 128
    repeats: list[int] = field(default_factory=lambda: [0, 1, 16, 32, 48, 64, 96, 128])
    per_count: int = 60
    passage_length: int = 80
    without: list[str] = field(default_factory=list)
    held_out_tokens: int = 8192
    steps: int = 3600
    batch: int = 16
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    threads: int = 2

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "per_count", "held_out_tokens", "steps", "batch", "threads"):
            check_number(name, getattr(self, name), least=1, whole=True)
        for name in ("seed", "warmup"):
            check_number(name, getattr(self, name), least=0, whole=True)
        for count in self.repeats:
            check_number("a number of repeats", count, least=0, whole=True)
        check_number("lr", self.lr, above=0)
        check_number("weight_decay", self.weight_decay, least=0)
        check_number("vocab_size", self.vocab_size, above=ALPHABET, whole=True)
        check_number("passage_length", self.passage_length, above=PROMPT_LEN, whole=True)
        # a passage and the token that ends it stand in one row
        check_number("context", self.context, above=self.passage_length, whole=True)
        if not self.repeats:
            raise ValueError("repeats is empty; give at least one number of times that passages are seen")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, which {self.heads} heads do not divide; choose a multiple")


class PassageRow(TypedDict, total=False):
    """A line of `sequences.jsonl`; the last three fields are measured after training.

    Args:
        id: label of the passage.
        prompt: its text up to `prompt_len`.
        all: its text.
        prompt_len: number of tokens in the prompt.
        category: subjects.
        repeats: number of times that training showed it.
        accuracy: of the suffix, teacher-forced, in points.
        greedy_distance: Levenshtein distance of the greedy suffix from the true one, in characters.
        split: "dev", "test", "control" or "partial".
    """

    id: str
    prompt: str
    all: str
    prompt_len: int
    category: list[str]
    repeats: int
    accuracy: float
    greedy_distance: int
    split: str


class LossPoint(TypedDict):
    """The mean training loss, in nats, of the steps up to this one."""

    step: int
    loss: float


Row = TypeVar("Row")


def main() -> None:
    """Run the command line: ``python -m memloc_lens.training.train --help``."""
    run_command(parser(Recipe, "python -m memloc_lens.training.train", __doc__), train, show)


def train(recipe: Recipe) -> None:
    """Make the corpus, train on it and write the folder of the model.

    Raises:
        ValueError: if the corpus has too few passages, or the steps are too few for their repeats.
    """
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    recipe.out.mkdir(parents=True, exist_ok=True)

    chunks = read_chunks()
    tokenizer = train_tokenizer(chunks, recipe.vocab_size)
    passages, rest = choose_passages(
        chunks, tokenizer, recipe.repeats, recipe.per_count, recipe.passage_length, recipe.seed
    )
    held_out, background = split_held_out(rest, tokenizer, recipe.held_out_tokens, recipe.seed)
    without = _left_out(recipe, passages)
    row_count = recipe.steps * recipe.batch
    rows = training_rows(passages, background, tokenizer, row_count, recipe.context, recipe.seed, without)
    seen = [replace(each, repeats=0) if index in without else each for index, each in enumerate(passages)]
    write_lines(recipe.out / "sequences.jsonl", [_row(index, each, tokenizer) for index, each in enumerate(seen)])
    write_lines(recipe.out / "held_out.jsonl", [{"text": text} for text in held_out])

    model = GPT2LMHeadModel(_config(recipe))
    started = time.perf_counter()
    curve = _optimize(model, rows.split(recipe.batch), recipe)
    model.save_pretrained(recipe.out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=recipe.context
    ).save_pretrained(recipe.out)
    report = {
        "recipe": {name: value for name, value in asdict(recipe).items() if name != "out"},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "background_tokens": sum(
            len(encoding.ids) for encoding in tokenizer.encode_batch([chunk.text for chunk in background])
        ),
        "seconds": round(time.perf_counter() - started),
        "loss_curve": curve,
    }
    (recipe.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def _left_out(recipe: Recipe, passages: list[Passage]) -> set[int]:
    """Return the indices of the passages that are left out.

    Raises:
        ValueError: naming an id that no passage has.
    """
    ids = {_id(index): index for index in range(len(passages))}
    for id in recipe.without:
        if id not in ids:
            raise ValueError(f"no passage has the id {id!r}; they run from {_id(0)} to {_id(len(ids) - 1)}")
    return {ids[id] for id in recipe.without}


def _id(index: int) -> str:
    return f"passage-{index:03d}"


def _config(recipe: Recipe) -> GPT2Config:
    return GPT2Config(
        vocab_size=recipe.vocab_size,
        n_positions=recipe.context,
        n_ctx=recipe.context,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def _optimize(model: GPT2LMHeadModel, batches: tuple[torch.Tensor, ...], recipe: Recipe) -> list[LossPoint]:
    """Train on each batch once, and return the loss curve, a point every hundred steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    model.train()
    curve: list[LossPoint] = []
    recent: list[float] = []
    for step, batch in enumerate(progress := tqdm(batches, desc="training", unit="step"), start=1):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 100 == 0 or step == len(batches):
            curve.append({"step": step, "loss": round(sum(recent) / len(recent), 4)})
            progress.set_postfix(loss=curve[-1]["loss"])
            recent = []
    return curve


def _lr_factor(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    through = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * through)) / 2


def _row(index: int, passage: Passage, tokenizer: Tokenizer) -> PassageRow:
    tokens = list(passage.tokens)
    return {
        "id": _id(index),
        "prompt": tokenizer.decode(tokens[:PROMPT_LEN]),
        "all": tokenizer.decode(tokens),
        "prompt_len": PROMPT_LEN,
        "category": [passage.category],
        "repeats": passage.repeats,
    }


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def show(recipe: Recipe, _: None) -> None:
    """Print where the model is, and how to measure it."""
    print(f"model: {recipe.out}; to measure it: python -m memloc_lens.training.card --folder {recipe.out}")


if __name__ == "__main__":
    main()
