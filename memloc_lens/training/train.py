"""Train the embedded model from the standard library's prose: ``python -m memloc_lens.models.training.train``.

The run writes a folder in transformers format (weights, configuration, tokenizer), `sequences.jsonl` (every
passage with its number of repeats), `held_out.jsonl` (text never seen) and `training.json` (recipe and loss curve).
The same seed on the same machine kind and Python version gives the same weights.
`python -m memloc_lens.models.training.card` then measures what was memorized.
"""

import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from memloc_lens.models.training.corpus import (
    END_OF_TEXT,
    PROMPT_LENGTH,
    Passage,
    choose_passages,
    read_chunks,
    split_held_out,
    train_tokenizer,
    training_rows,
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights of the embedded model."""

    out: Path
    """Folder that receives the model."""
    seed: int = 0
    """Seed of the initial weights, of the choice of passages and of the order of the rows."""
    layers: int = 6
    width: int = 192
    heads: int = 6
    vocab_size: int = 4096
    context: int = 128
    """Tokens in a training row, and the longest input of the model."""
    repeats: list[int] = field(default_factory=lambda: [0, 1, 16, 32, 48, 64, 96, 128])
    """The numbers of times that passages are seen."""
    per_count: int = 60
    """Passages for each number of repeats."""
    passage_length: int = 80
    """Tokens in a passage."""
    held_out_tokens: int = 8192
    steps: int = 3600
    batch: int = 16
    """Rows in a step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW, reached after `warmup` steps and lowered by a cosine to a twentieth."""
    warmup: int = 100
    weight_decay: float = 0.1
    threads: int = 2
    """Processor threads: another number adds up in another order, and gives other weights."""


def train(recipe: Recipe) -> None:
    """Make the corpus, train on it and write the model's folder."""
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
    rows = training_rows(passages, background, tokenizer, recipe.steps * recipe.batch, recipe.context, recipe.seed)
    write_lines(recipe.out / "sequences.jsonl", [_row(n, passage, tokenizer) for n, passage in enumerate(passages)])
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
            len(encoding.ids) for encoding in tokenizer.encode_batch([c.text for c in background])
        ),
        "seconds": round(time.perf_counter() - started),
        "loss_curve": curve,
    }
    (recipe.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


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


def _optimize(model: GPT2LMHeadModel, batches: tuple[torch.Tensor, ...], recipe: Recipe) -> list[dict[str, float]]:
    """Train on each batch once; the mean loss (nats) of every hundred steps comes back."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    model.train()
    curve: list[dict[str, float]] = []
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


def _row(number: int, passage: Passage, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = list(passage.tokens)
    return {
        "id": f"passage-{number:03d}",
        "prompt": tokenizer.decode(tokens[:PROMPT_LENGTH]),
        "all": tokenizer.decode(tokens),
        "prompt_len": PROMPT_LENGTH,
        "category": [passage.category],
        "repeats": passage.repeats,
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    train(tyro.cli(Recipe, description=__doc__))
