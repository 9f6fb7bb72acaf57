"""Erase memorized sequences from a model, and write a checkpoint without them.

1. Every sequence is located. Scores and the steps of the choice are kept in OUT.work, so that an interrupted command
   resumes when it is repeated.
2. One set of components is chosen without which no sequence can be extracted, by its own prompt or by variants of it.
3. If the damage is within the budget, the components' weights are set to zero in a copy of the model's folder: plain
   transformers loads it, and tokenizer, licence and number format stay as they came. Otherwise nothing is written, and
   the table says what was reached. The original is never changed.

    python -m memloc_lens.erase --model FOLDER --data requests.jsonl --others memorized.jsonl --out FOLDER-erased

That a text cannot be extracted is not a proof that it is gone: a set that is switched off may be learned again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from jaxtyping import Int
from torch import Tensor

from memloc_lens.benchmarks.context import HELD_OUT, with_context
from memloc_lens.checks import check_choice, check_first_layer, check_number
from memloc_lens.components import ComponentName, Scope, component_of
from memloc_lens.data import load_sequences, load_texts
from memloc_lens.erase.checkpoint import check_free, check_target, write_checkpoint
from memloc_lens.erase.choosing import Erasure, check_extracted, choose
from memloc_lens.erase.damage import Budget, Spared
from memloc_lens.erase.erasing import PRESETS, described, reached
from memloc_lens.erase.kept import KeptSteps, origin
from memloc_lens.erase.localizing import localize
from memloc_lens.erase.table import print_erasure
from memloc_lens.library_types import HookedModel
from memloc_lens.localizers.context import shares_text
from memloc_lens.metrics import text_rows
from memloc_lens.models import EMBEDDED
from memloc_lens.products import fast_products
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.disk import disk_errors, write_whole
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.lock import lock
from memloc_lens.runs.losses import check_losses
from memloc_lens.runs.methods import AnyLocalizer, configured, reads_context, resolve
from memloc_lens.runs.quiet import may_be_quiet
from memloc_lens.runs.settings import RunSettings, identities
from memloc_lens.runs.visible import visible
from memloc_lens.sequence import MemorizedSequence, drawn
from memloc_lens.smallest_set import Until, check_until


@dataclass(frozen=True)
class EraseSettings(RunSettings):
    """What to erase, and what it may cost.

    Args:
        data: Sequences to erase: JSON lines with "all" and "prompt_len", or another format that is read. Default: the
            embedded model's sequences.
        prompt_len: Number of tokens in the prompts of data that do not say. Default: 32 for token ids.
        component: Kind of component to erase: single weights of W_out, which cost the least damage; MLP neurons, which
            need the least memory; or attention heads.
        limit: Number of sequences to erase, the first of the data; 0 takes all.
        out: Folder to write, which must not exist. Beside it, OUT.work keeps scores and what was reached.
        max_ppl_rise: Most that the perplexity of other text may rise, in percent.
        max_neg_loss: Most that the accuracy of other memorized sequences may fall, in points.
        until: What must be below the limit, whatever the prompt: "unextractable", tokens of the suffix that greedy
            decoding writes in one piece; "greedy", tokens before its first mistake; "accuracy", teacher-forced, in
            points; "sampled", the probability that one of 1000 samples is the suffix.
        until_limit: The limit. Default: half of the suffix, rounded up; 50 points; 0.1.
        others: Other memorized sequences, which should stay: a file as for data. Default: those of the data after the
            limit.
        negatives: Number of them to measure on, drawn once; 0 takes all.
        text: Unrelated text for the perplexity: a text file, or JSON lines with "text". Default: held-out text of
            the embedded model, which is prose about Python.
        text_tokens: Number of tokens of that text.
        method: Localizer, by name, or as package.module:Class. Default: iterative-gradient; with a context,
            protect-iterative-gradient.
        first_layer: First layer to erase from.
        scope: Take the highest scores of every layer, or of all layers together.
        batch: Number of sequences that are localized or evaluated at a time.
        device: Device of the model. Default: CUDA if there is one, else the CPU.
        n_devices: Number of GPUs that share the layers of the model, from the device on.
        dtype: Precision of computation; the numbers in the folder stay as they came.
        seed: Seed of the draw of other sequences.
    """

    presets: ClassVar[Mapping[str, Mapping[str, AnyLocalizer]]] = PRESETS

    data: str | Path | None = None
    prompt_len: int | None = None
    component: ComponentName = "weight"
    limit: int = 0
    out: Path = Path("erased")
    max_ppl_rise: float = 2.0
    max_neg_loss: float = 2.0
    until: Until = "unextractable"
    until_limit: float | None = None
    others: str | Path | None = None
    negatives: int = 64
    text: Path | None = None
    text_tokens: int = 2048
    method: str | None = None
    first_layer: int = 1
    scope: Scope = "global"
    batch: int = 16
    ratios: Annotated[tuple[float, ...], tyro.conf.Suppress] = ()
    config: Annotated[Path | None, tyro.conf.Suppress] = None
    tracker: Annotated[str | None, tyro.conf.Suppress] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scope", self.scope, ("layer", "global"))
        check_until(self.until, self.until_limit)
        if self.prompt_len is not None:
            check_number("prompt_len", self.prompt_len, least=1, whole=True)
        for name in ("negatives", "first_layer"):
            check_number(name, getattr(self, name), least=0, whole=True)
        for name in ("batch", "text_tokens"):
            check_number(name, getattr(self, name), least=1, whole=True)
        Budget(self.max_ppl_rise, self.max_neg_loss)

    def localizers(self) -> list[AnyLocalizer]:
        """Return the method, with the settings that it shares with the command."""
        has_context = self.model == EMBEDDED.name or self.context is not None or bool(self.context_sequences)
        name = self.method or ("protect-iterative-gradient" if has_context else "iterative-gradient")
        chosen = self.methods[0] if self.methods else resolve(name, self.presets.get(self.component))
        return [configured(resolve(chosen), self.component, first_layer=self.first_layer, scope=self.scope)]

    @property
    def budget(self) -> Budget:
        """How much may be lost."""
        return Budget(self.max_ppl_rise, self.max_neg_loss)

    @property
    def work(self) -> Path:
        """The folder beside the result that keeps scores and what was reached."""
        return self.out.with_name(f"{self.out.name}.work")


def main() -> None:
    """Run the command line: ``python -m memloc_lens.erase --help``."""
    run_command(parser(EraseSettings, "python -m memloc_lens.erase", __doc__), run, show)


@may_be_quiet
def run(settings: EraseSettings) -> Erasure:
    """Choose what to erase, and write the folder if that is within the budget.

    Args:
        settings: of the command. Scores in `work` are read again if they are of the same model, method and sequences.

    Returns:
        What was chosen, and what it costs.

    Raises:
        ValueError: for settings, files or folders that cannot be used, before any long work.

    Example:
        >>> small = dict(method="gradient", component="neuron", context_sequences=1, text_tokens=256, negatives=4)
        >>> settings = EraseSettings(limit=1, max_ppl_rise=20, out=Path("erased"), device="cpu", **small)
        >>> run(settings).succeeded, Path("erased/erasure.json").is_file()
        (True, True)
    """
    check_free(settings.out)
    if settings.model == EMBEDDED.name or Path(settings.model).expanduser().exists():
        check_target(settings.model, settings.out)  # before anything is written; others have no folder until loaded
    with disk_errors(settings.work):
        settings.work.mkdir(parents=True, exist_ok=True)
        held = lock(settings.work)
    try:
        return _run(settings)
    finally:
        held.release()


def _run(settings: EraseSettings) -> Erasure:
    model = settings.load_model()
    check_target(settings.model, settings.out)
    targets, spared, settings = material(settings, model)
    (localizer,), kind = settings.localizers(), component_of(settings.component)
    measured = [identities(spared.others), None if spared.text is None else spared.text.tolist()]
    how = [settings.until, settings.until_limit, settings.first_layer, settings.scope, settings.dtype]
    steps = KeptSteps(settings.work / "steps.json", origin(fingerprint(model), localizer, targets, measured, how))
    with settings.memory_budget(model), fast_products(model.cfg.device):
        erasure = choose(
            model,
            targets,
            localize(settings.work, model, targets, localizer, kind, settings.batch, settings),
            spared,
            settings.budget,
            until=settings.until,
            limit=settings.until_limit,
            first_layer=settings.first_layer,
            scope=settings.scope,
            component=kind,
            batch=settings.batch,
            kept=steps,
            progress=True,
        )
    told = json.dumps(reached(erasure), indent=1) + "\n"
    with disk_errors(settings.work):
        write_whole(settings.work / "reached.json", lambda part: part.write_text(told, "utf-8"))
    if erasure.succeeded:
        about = described(erasure, model, targets, localizer)
        write_checkpoint(settings.model, settings.out, erasure.components, model=model, about=about)
    return erasure


def material(settings: EraseSettings, model: HookedModel) -> tuple[list[MemorizedSequence], Spared, EraseSettings]:
    """Load what is erased, what is spared, and the context of the method.

    Returns:
        The sequences to erase, what is spared, and the settings with a method that knows its context.

    Raises:
        ValueError: if a setting does not fit the model, files cannot be used, or no sequence can be extracted.
    """
    check_first_layer(settings.first_layer, model.cfg.n_layers)
    load = partial(load_sequences, model, prompt_len=settings.prompt_len, bos=settings.bos)
    memorized = load(settings.data)
    targets = memorized[: settings.limit or None]
    rest = memorized[len(targets) :] if settings.others is None else load(settings.others)
    others = [own for own in drawn(rest, settings.negatives, settings.seed) if not shares_text(own, targets)]
    spared = Spared(_text(settings, model), others)
    check_losses(model, [*targets, *others], settings.batch)
    check_extracted(model, targets, settings.until, settings.until_limit, settings.batch)
    if any(map(reads_context, settings.localizers())):
        dev = load(settings.data, "dev")
        settings = with_context(settings, model, [*dev, *reversed(rest)], [*targets, *others], spared.text)
    spared.check_disjoint(targets)
    return targets, spared, settings


def _text(settings: EraseSettings, model: HookedModel) -> Int[Tensor, "row pos"] | None:
    if model.tokenizer is None:
        if settings.text is not None:
            raise ValueError(f"{settings.model} has no tokenizer to read text with, for the perplexity")
        return None
    return text_rows(model, load_texts(settings.text or HELD_OUT), settings.text_tokens, bos=settings.bos)


def show(settings: EraseSettings, erasure: Erasure) -> None:
    """Print what was reached.

    Raises:
        ValueError: if nothing was written, saying why.
    """
    print_erasure(erasure)
    if not erasure.succeeded:
        raise ValueError(f"nothing was written to {settings.out}: {why_not(erasure)}")
    print(f"\ncheckpoint: {visible(settings.out)}")


def why_not(erasure: Erasure) -> str:
    """Return why an erasure did not succeed, and what can be changed."""
    cost = f"it costs {_said(erasure.ppl_rise, '% of perplexity')} and {_said(erasure.neg_loss, ' points of others')}"
    if erasure.within_budget:
        return f"{len(erasure.extracted)} sequences are still extracted; choose another --method or --component"
    return f"{cost}; erase fewer sequences, choose another --method or --component, or allow more"


def _said(value: float | None, unit: str) -> str:
    return f"an unknown amount{unit}" if value is None else f"{value:.2f}{unit}"
