"""Texts that most models know by heart -> sequences for DEL on a model, and a context for its methods.

    python benchmarks/real/well_known.py --model smollm2-135m --out runs/well-known

`sequences.jsonl` has the texts that the model recites best, 24 tokens of prompt and 48 of suffix each, and as the split
"dev" the next best; `context.jsonl` the opening of some literary ones that it does not know, and prose about Python.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from memloc_lens import MemorizedSequence, load_model
from memloc_lens.benchmarks.context import HELD_OUT
from memloc_lens.data import load_texts
from memloc_lens.metrics import suffix_accuracy, teacher_forced
from memloc_lens.products import fast_products
from memloc_lens.sequence import decode

PROMPT, LENGTH, PROSE_TOKENS = 24, 72, 1500


@dataclass(frozen=True)
class Settings:
    """What to make.

    Args:
        model: reads the texts.
        out: Folder for the two files.
        texts: JSON lines with `id`, `text` and `category`.
        known: Number of texts to take as memorized; the least known literary ones are the context.
        dev: Number of texts, the next best known, for the split "dev".
        context: Number of literary texts for the context.
    """

    model: str = "smollm2-135m"
    out: Path = Path("runs/well-known")
    texts: Path = Path(__file__).parent / "well_known.jsonl"
    known: int = 16
    dev: int = 4
    context: int = 6


def main(settings: Settings) -> None:
    """Write both files, and print how well each text is known."""
    model = load_model(settings.model)
    rows = [json.loads(line) for line in settings.texts.read_text("utf-8").splitlines()]
    cut = {
        row["id"]: MemorizedSequence(
            MemorizedSequence.from_text(model, row["text"], 1, bos=False).tokens[:LENGTH],
            PROMPT,
            row["id"],
            row["category"],
        )
        for row in rows
    }
    sequences = list(cut.values())
    with fast_products(model.cfg.device):
        accuracies = suffix_accuracy(teacher_forced(model, sequences), sequences).tolist()
    ranked = sorted(zip(accuracies, sequences, strict=True), key=lambda pair: -pair[0])
    known, unknown = ranked[: settings.known], ranked[settings.known :]
    literary = [sequence for _, sequence in reversed(unknown) if "literature" in sequence.category][: settings.context]
    prose = model.tokenizer("\n\n".join(load_texts(HELD_OUT)), add_special_tokens=False)["input_ids"][-PROSE_TOKENS:]
    settings.out.mkdir(parents=True, exist_ok=True)
    dev = unknown[: settings.dev]
    _write(settings.out / "sequences.jsonl", [
        dict(id=one.id, tokens=one.tokens.tolist(), prompt_len=PROMPT, category=list(one.category), split=split)
        for split, part in (("test", known), ("dev", dev))
        for _, one in part
    ])  # fmt: skip
    texts = [decode(model, one.tokens) for one in literary] + [model.tokenizer.decode(prose)]
    _write(settings.out / "context.jsonl", [{"text": text} for text in texts])
    for accuracy, sequence in ranked:
        print(f"{accuracy:5.1f}  {sequence.id:14} {'known' if (accuracy, sequence) in known else ''}")


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
