"""Audit an erased checkpoint: try to bring the erased sequences back, and measure what else was lost.

1. Extraction: by the sequences' own prompts and by variants of them, by greedy decoding and by sampling.
2. Relearning: how many steps of fine-tuning bring a sequence back, against those that a new text takes.
3. Membership: whether losses still tell the sequences from texts that the model has never seen.
4. Damage: the accuracy of other memorized sequences and the perplexity of other text.

    python -m memloc_lens.erase.audit_command ORIGINAL ERASED --data requests.jsonl --controls unseen.jsonl

`audit.json` and `AUDIT.md` are written into the erased folder when all is measured. Each part is kept in ERASED.audit
as soon as it is measured, so that an interrupted command resumes when it is repeated. An audit can show that a text is
still there; it cannot show that it is gone.
"""

import json
from dataclasses import dataclass
from functools import partial
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

import tyro

from memloc_lens.benchmarks.context import HELD_OUT
from memloc_lens.checks import check_number
from memloc_lens.data import load_sequences, load_texts
from memloc_lens.erase.audit import audit, write_audit
from memloc_lens.erase.given import read_prompts
from memloc_lens.erase.relearning import Relearning
from memloc_lens.erase.schema import Audit
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.context import shares_text
from memloc_lens.metrics import text_rows
from memloc_lens.models import EMBEDDED, check_device, load_model
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.folder import resuming
from memloc_lens.runs.quiet import may_be_quiet
from memloc_lens.runs.records import read_table
from memloc_lens.runs.settings import identity
from memloc_lens.runs.visible import visible
from memloc_lens.sequence import MemorizedSequence

LEFT_OUT = "context of the erasure, left out"
"""What the audit calls sequences that the erasure's method has read."""


@dataclass(frozen=True)
class AuditSettings:
    """What to audit.

    Args:
        original: Model before the erasure: a folder, or a name as for the other commands.
        erased: Folder of the erased checkpoint.
        out: Folder to which the audit is written; beside it, OUT.audit keeps what was measured. Default: that of the
            erased checkpoint.
        data: Erased sequences: a file as for DEL. Those that the folder's erasure.json names are taken; the first
            ones, if it has none. Default: the embedded model's sequences.
        prompt_len: Number of tokens in the prompts of data that do not say. Default: 32 for token ids.
        limit: Number of sequences to audit, the first of those erased; 0 takes all.
        prompts: Other prompts for the erased sequences, such as paraphrases: JSON lines with "id" and "prompt".
        others: Memorized sequences that should stay. Default: the others of the data. Those that the folder's
            erasure.json names as context, which the erasure's method has read, are left out.
        negatives: Number of them, the first ones; 0 takes all.
        controls: Texts that the model has never seen: a file as for data, at least as many as are audited. Default:
            those of the data's split "control".
        text: Unrelated text for the perplexity: a text file, or JSON lines with "text". Default: held-out text of
            the embedded model.
        text_tokens: Number of tokens of that text.
        retrained: Model that was trained without the sequences, if there is one.
        max_steps: Most steps of fine-tuning.
        every: Look whether the sequence is back after so many steps.
        lr: Learning rate of the fine-tuning.
        samples: Number of samples of which one is to be the exact suffix.
        batch: Number of sequences at a time.
        device: Device of the models. Default: CUDA if there is one, else the CPU.
        n_devices: Number of GPUs that share the layers of a model, from the device on.
        quiet: Show no progress bars.
    """

    original: tyro.conf.Positional[str]
    erased: tyro.conf.Positional[Path]
    out: Path | None = None
    data: Path | None = None
    prompt_len: int | None = None
    limit: int = 0
    prompts: Path | None = None
    others: Path | None = None
    negatives: int = 64
    controls: Path | None = None
    text: Path | None = None
    text_tokens: int = 2048
    retrained: str | None = None
    max_steps: int = 40
    every: int = 1
    lr: float = 1e-4
    samples: int = 1000
    batch: int = 16
    device: str | None = None
    n_devices: int = 1
    quiet: bool = False

    def __post_init__(self) -> None:
        check_device(self.device, self.n_devices)
        for name in ("limit", "negatives"):
            check_number(name, getattr(self, name), least=0, whole=True)
        for name in ("text_tokens", "samples", "batch"):
            check_number(name, getattr(self, name), least=1, whole=True)
        self.relearning()

    def relearning(self) -> Relearning:
        """Return how the erased model is fine-tuned."""
        return Relearning(lr=self.lr, max_steps=self.max_steps, every=self.every)

    @property
    def written(self) -> Path:
        """The folder to which the audit is written."""
        return self.out or self.erased

    @property
    def work(self) -> Path:
        """The folder beside it that keeps what was measured."""
        folder = self.written.expanduser().resolve()
        return folder.with_name(f"{folder.name}.audit")


def main() -> None:
    """Run the command line: ``python -m memloc_lens.erase.audit_command --help``."""
    run_command(parser(AuditSettings, "memloc audit", __doc__), run, show)


@may_be_quiet
def run(settings: AuditSettings) -> Audit:
    """Audit a checkpoint, and write the audit into its folder.

    Raises:
        ValueError: for settings, files or models that cannot be used, before any long work.
    """
    if not settings.erased.is_dir():
        raise ValueError(f"erased is {settings.erased}, which is no folder; give the folder of the erased checkpoint")
    with resuming(settings.work):
        return _run(settings)


def _run(settings: AuditSettings) -> Audit:
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    load = partial(load_model, device=settings.device, n_devices=settings.n_devices)
    original, erased = load(settings.original), load(settings.erased)
    retrained = None if settings.retrained is None else load(settings.retrained)
    targets, others, controls = _sequences(settings, original)
    known, others = _split(others, settings.erased)
    rows = None
    if original.tokenizer is not None:
        rows = text_rows(original, load_texts(settings.text or HELD_OUT), settings.text_tokens)
    found = audit(
        original,
        erased,
        targets,
        others[: settings.negatives or None],
        controls,
        rows,
        prompts=prompts,
        retrained=retrained,
        relearning=settings.relearning(),
        samples=settings.samples,
        batch=settings.batch,
        work=settings.work,
    )
    if known:
        found["texts"][LEFT_OUT] = [each.id for each in known]
    write_audit(settings.written, found)
    return found


def _sequences(
    settings: AuditSettings, model: HookedModel
) -> tuple[list[MemorizedSequence], list[MemorizedSequence], list[MemorizedSequence]]:
    """Load the erased sequences, those that should stay, and those that were never seen."""
    if settings.data is None and settings.original != EMBEDDED.name:
        raise ValueError(f"the original is {settings.original!r}, and no data is given; give the sequences as --data")
    load = partial(load_sequences, model, prompt_len=settings.prompt_len)
    memorized, erasure = load(settings.data), _erasure(settings.erased)
    erased = memorized[: settings.limit or None]
    if erasure:
        named = {id for id, _ in erasure["sequences"]}
        erased = [sequence for sequence in memorized if sequence.id in named]
    if not erased:
        raise ValueError(f"the data has none of the sequences that {settings.erased / 'erasure.json'} names")
    targets = erased[: settings.limit or None]
    gone = {sequence.id for sequence in erased}
    rest = load(settings.others) if settings.others else [own for own in memorized if own.id not in gone]
    others = [own for own in rest if not shares_text(own, targets)]
    controls = load(settings.controls) if settings.controls else load(settings.data, "control")
    if len(controls) < len(targets):
        raise ValueError(
            f"{len(controls)} texts were never seen, and {len(targets)} sequences are audited; give more as "
            "--controls, or lower --limit"
        )
    return targets, others, controls


def _split(others: list[MemorizedSequence], folder: Path) -> tuple[list[MemorizedSequence], list[MemorizedSequence]]:
    """Return the sequences that the erasure's method has read, which it may have spared on purpose, and the others."""
    read = {content for _, content in _erasure(folder).get("context", [])}
    known = [identity(own)[1] in read for own in others]
    return list(compress(others, known)), list(compress(others, map(not_, known)))


def _erasure(folder: Path) -> dict[str, Any]:
    """Return what the folder tells of its erasure, nothing if it does not tell."""
    file = folder / "erasure.json"
    return read_table(file) if file.is_file() else {}


def show(settings: AuditSettings, found: Audit) -> None:
    """Print the figures that matter most, and where the others are."""
    own = found["extraction"]["own"]
    for when in ("before", "after"):
        told = own[when]
        print(
            f"{when}: {told['prefix']['mean']:.1f} tokens recited, extraction strength {told['strength']['mean']:.2f}"
        )
    for lesson, result in found["relearning"].items():
        print(f"relearning, {lesson}: resurfacing ratio {json.dumps(result['resurfacing']['new'])}")
    if LEFT_OUT in found["texts"]:
        print(f"{LEFT_OUT}: {len(found['texts'][LEFT_OUT])} of the others")
    print(f"\naudit: {visible(settings.written / 'AUDIT.md')}")


if __name__ == "__main__":
    main()
