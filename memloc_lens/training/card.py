"""Measure what the embedded model memorized, and write its card: ``python -m memloc_lens.models.training.card``.

Every passage in `sequences.jsonl` gets its accuracy, the distance of its greedy continuation, and a split by the
definition of memorized of Chang et al. (2024), sec. 5.1:

* `dev` (the first 5) and `test`: memorized, that is suffix accuracy above 90 points, a greedy text within 20
  characters, and at least 16 distinct tokens in the suffix, true and generated;
* `control`: seen at most once, and not memorized;
* `partial`: everything else.
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from memloc_lens.data import load_texts
from memloc_lens.metrics import free_running, perplexity, suffix_accuracy, teacher_forced, text_distance, text_rows
from memloc_lens.models import EMBEDDED, load_model
from memloc_lens.models.training.train import write_lines
from memloc_lens.sequence import MemorizedSequence

DEV = 5


def measure(folder: Path = EMBEDDED) -> None:
    """Measure the model in a folder; complete its `sequences.jsonl` and write its `CARD.md`."""
    model = load_model(folder, device="cpu")
    rows = [json.loads(line) for line in (folder / "sequences.jsonl").read_text().splitlines()]
    sequences = [MemorizedSequence.from_text(model, row["all"], row["prompt_len"], row["id"]) for row in rows]
    accuracies = suffix_accuracy(teacher_forced(model, sequences), sequences).tolist()
    generated = free_running(model, sequences)
    distances = text_distance(model, generated, sequences).tolist()
    memorized = 0
    for row, sequence, accuracy, distance, continuation in zip(
        rows, sequences, accuracies, distances, generated, strict=True
    ):
        distinct = min(len(sequence.suffix.unique()), len(continuation.unique()))
        row |= {"accuracy": round(accuracy, 2), "greedy_distance": int(distance)}
        if accuracy > 90 and distance <= 20 and distinct >= 16:
            row["split"] = "dev" if memorized < DEV else "test"
            memorized += 1
        else:
            row["split"] = "control" if row["repeats"] <= 1 else "partial"
    write_lines(folder / "sequences.jsonl", rows)
    held_out = text_rows(model, load_texts(folder / "held_out.jsonl"), tokens=8192)
    training = json.loads((folder / "training.json").read_text())
    (folder / "CARD.md").write_text(_card(rows, training, perplexity(model, held_out), held_out.numel()))


def _card(
    rows: list[dict[str, Any]], training: dict[str, Any], held_out_perplexity: float, held_out_tokens: int
) -> str:
    recipe, curve = training["recipe"], training["loss_curve"]
    by_count: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_count[row["repeats"]].append(row)
    memorized = [row for row in rows if row["split"] in ("dev", "test")]
    controls = [row for row in rows if row["split"] == "control"]
    lines = [
        f"| {count} | {len(group)} | {fmean(row['accuracy'] for row in group):.1f} "
        f"| {fmean(row['greedy_distance'] for row in group):.1f} "
        f"| {sum(row['split'] in ('dev', 'test') for row in group)} |"
        for count, group in sorted(by_count.items())
    ]
    points = [curve[0], *curve[len(curve) // 8 - 1 :: max(len(curve) // 8, 1)]]
    return f"""# The embedded model

A GPT-2 of {recipe["layers"]} layers, {recipe["width"]} wide, with {recipe["heads"]} heads, a context of \
{recipe["context"]} tokens and a byte-level BPE vocabulary of {recipe["vocab_size"]}, made to be small enough to
travel with the package and to hold sequences of which it is known how often they were seen.

## Data

Prose that every Python carries: the language reference (`pydoc_data.topics`), docstrings and longer comments of
the standard library of Python {training["python"]}. {len(rows)} passages of {recipe["passage_length"]} tokens were taken
out of it that share almost no 5-gram with the rest, and were shown the number of times below, each time at the start
of a row of {recipe["context"]} tokens. The other {training["background_tokens"]} tokens are background, seen in shuffled
epochs. {held_out_tokens} tokens of held-out text were never seen (`held_out.jsonl`).

The texts are the Python Software Foundation's and other contributors' to Python, under the PSF licence.

## Recipe

`python -m memloc_lens.models.training.train --out FOLDER --seed {recipe["seed"]}`, then
`python -m memloc_lens.models.training.card --folder FOLDER`

{recipe["steps"]} steps of {recipe["batch"]} rows; AdamW, peak learning rate {recipe["lr"]}, {recipe["warmup"]} steps of
warm-up, cosine to a twentieth, weight decay {recipe["weight_decay"]}; float32, {recipe["threads"]} threads,
torch {training["torch"]} on {training["machine"]}, {training["seconds"] / 60:.0f} minutes. The same seed on the same kind of
machine, with the same versions of Python and torch, gives the same weights.

| step | {" | ".join(str(point["step"]) for point in points)} |
|---|{"---|" * len(points)}
| loss (nats) | {" | ".join(f"{point['loss']:.2f}" for point in points)} |

The loss is the training loss over passages and background together; `training.json` has every hundredth step.

## What it memorized

Of the {recipe["passage_length"] - rows[0]["prompt_len"]} tokens after a prompt of {rows[0]["prompt_len"]}: teacher-forced accuracy,
Levenshtein distance of the greedy text, and how many passages are memorized (accuracy above 90, greedy text within
20 characters, at least 16 distinct tokens in the suffix).

| times seen | passages | mean accuracy (points) | mean greedy distance (characters) | memorized |
|---|---|---|---|---|
{chr(10).join(lines)}

{len(memorized)} passages are memorized ({DEV} of them set aside as `dev`, to choose settings on) and {len(controls)} are controls:
seen at most once and not memorized. Perplexity on the held-out text: {held_out_perplexity:.1f}.
`sequences.jsonl` has every passage with its repeats, accuracy, distance and split.
"""


if __name__ == "__main__":
    tyro.cli(measure)
