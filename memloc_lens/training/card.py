"""Measure what a trained model memorized, and write its card: ``python -m memloc_lens.training.card --folder FOLDER``.

Every passage in `sequences.jsonl` gets its accuracy, the distance of its greedy suffix, and a split by the definition
of memorized text of Chang et al. (2024), sec. 5.1:

* `dev` (the first 5) and `test`: memorized. The suffix accuracy is above 90 points, the greedy suffix is within 20
  characters, and the suffix has at least 16 different tokens, both the true and the generated one.
* `control`: seen at most once, and not memorized.
* `partial`: all others.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from memloc_lens.data import load_texts
from memloc_lens.library_types import HookedModel
from memloc_lens.metrics import free_running, perplexity, suffix_accuracy, teacher_forced, text_distance, text_rows
from memloc_lens.models import EMBEDDED, load_model
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.sequence import MemorizedSequence
from memloc_lens.training.train import PassageRow, write_lines

DEV = 5
"""Number of memorized passages to set aside for choosing settings."""


@dataclass(frozen=True)
class CardSettings:
    """Which model to measure.

    Args:
        folder: Folder of a trained model. Its sequences.jsonl and CARD.md are written anew. Default: the embedded
            model's.
    """

    folder: Path = EMBEDDED


def main() -> None:
    """Run the command line: ``python -m memloc_lens.training.card --help``."""
    run_command(parser(CardSettings, "python -m memloc_lens.training.card", __doc__), measure, show)


def measure(settings: CardSettings) -> None:
    """Measure the model in a folder, add to its `sequences.jsonl` and write its `CARD.md`.

    Raises:
        ValueError: if the folder holds no model that `memloc_lens.training.train` wrote.
    """
    folder = settings.folder
    training, rows = _read(folder)
    model = load_model(folder, device="cpu")
    measured = _measured(model, rows)
    write_lines(folder / "sequences.jsonl", measured)
    held_out = text_rows(model, load_texts(folder / "held_out.jsonl"), tokens=8192)
    card = _card(measured, training, perplexity(model, held_out), held_out.numel())
    (folder / "CARD.md").write_text(card)


def _read(folder: Path) -> tuple[dict[str, Any], list[PassageRow]]:
    """Return the content of `training.json` and `sequences.jsonl`."""
    try:
        training = json.loads((folder / "training.json").read_text())
        return training, [json.loads(line) for line in (folder / "sequences.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no model that memloc_lens.training.train wrote: {error}") from error


def _measured(model: HookedModel, rows: list[PassageRow]) -> list[PassageRow]:
    """Return the rows with accuracy, greedy distance and split."""
    sequences = [MemorizedSequence.from_text(model, row["all"], row["prompt_len"], row["id"]) for row in rows]
    accuracies = suffix_accuracy(teacher_forced(model, sequences), sequences).tolist()
    suffixes = free_running(model, sequences)
    distances = text_distance(model, suffixes, sequences).tolist()
    measured: list[PassageRow] = []
    dev = 0
    for row, sequence, accuracy, distance, suffix in zip(rows, sequences, accuracies, distances, suffixes, strict=True):
        distinct = min(len(sequence.suffix.unique()), len(suffix.unique()))
        if accuracy > 90 and distance <= 20 and distinct >= 16:
            split = "dev" if dev < DEV else "test"
            dev += split == "dev"
        else:
            split = "control" if row["repeats"] <= 1 else "partial"
        measured.append({**row, "accuracy": round(accuracy, 2), "greedy_distance": int(distance), "split": split})
    return measured


def _card(rows: list[PassageRow], training: dict[str, Any], held_out_perplexity: float, held_out_tokens: int) -> str:
    recipe, curve = training["recipe"], training["loss_curve"]
    by_count: dict[int, list[PassageRow]] = defaultdict(list)
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

`python -m memloc_lens.training.train --out FOLDER --seed {recipe["seed"]}`, then
`python -m memloc_lens.training.card --folder FOLDER`

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


def show(settings: CardSettings, _: None) -> None:
    """Print where the card is."""
    print(f"card: {settings.folder / 'CARD.md'}")


if __name__ == "__main__":
    main()
