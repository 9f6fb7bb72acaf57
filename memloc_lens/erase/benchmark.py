"""Put ways of forgetting side by side: what they leave of the sequences, what they cost, and how fast it comes back.

For each way (`memloc_lens.erase.ways`):

1. The number of sequences that are still extracted by any of the prompt variants, and what is left of the others.
2. What was lost: the perplexity of other text, and the accuracy of other memorized sequences.
3. Relearning: the steps of fine-tuning until a sequence can be extracted again, and until a text can that the model has
   never seen. Their ratio is the resurfacing ratio.
4. Seconds.

    memloc forgetting --limit 20 --out runs/forgetting

An interrupted command resumes when it is repeated.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from tqdm.auto import tqdm

from memloc_lens.checks import check_choice, check_number
from memloc_lens.components import ComponentName, Scope
from memloc_lens.data import load_sequences
from memloc_lens.erase.command import EraseSettings, material
from memloc_lens.erase.criteria import extracted
from memloc_lens.erase.damage import Spared
from memloc_lens.erase.extraction import recitations
from memloc_lens.erase.forgetting import Forgetting, Row, print_forgetting
from memloc_lens.erase.membership import membership
from memloc_lens.erase.relearning import Relearning, resurfacing
from memloc_lens.erase.state import cells
from memloc_lens.erase.variants import prompts_of
from memloc_lens.erase.ways import ITERATIVE, WAYS, Forgotten, Task
from memloc_lens.library_types import HookedModel
from memloc_lens.models import backend_of, load_model
from memloc_lens.products import fast_products
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.disk import disk_errors, write_whole
from memloc_lens.runs.fingerprint import fingerprint
from memloc_lens.runs.lock import lock
from memloc_lens.runs.methods import context_of
from memloc_lens.runs.parallel import Parallel
from memloc_lens.runs.provenance import provenance
from memloc_lens.runs.quiet import may_be_quiet
from memloc_lens.runs.records import read_table
from memloc_lens.runs.settings import identities
from memloc_lens.runs.visible import visible
from memloc_lens.sequence import MemorizedSequence


@dataclass(frozen=True)
class ForgettingSettings(EraseSettings):
    """What to compare.

    Args:
        ways: Ways of forgetting, by name. Default: all; "retrained" only if there is such a model.
        retrained: Model that was trained without the sequences: a name or a folder.
        controls: Texts that the model has never seen, for relearning: a file as for data. Default: the data's split
            "control".
        relearn: Number of sequences to relearn, at most, the first ones, and of new texts.
        max_steps: Most steps of fine-tuning.
        lr: Learning rate of the fine-tuning.
        limit: Number of sequences to forget, the first of the data; 0 takes all.
        out: Folder of the rows and of summary.json.
    """

    ways: tuple[str, ...] = ()
    retrained: str | None = None
    controls: Path | None = None
    relearn: int = 8
    max_steps: int = 40
    lr: float = 1e-4
    out: Path = Path("runs/forgetting")
    component: Annotated[ComponentName, tyro.conf.Suppress] = "neuron"
    method: Annotated[str | None, tyro.conf.Suppress] = ITERATIVE
    scope: Annotated[Scope, tyro.conf.Suppress] = "global"
    max_ppl_rise: Annotated[float, tyro.conf.Suppress] = 2.0
    max_neg_loss: Annotated[float, tyro.conf.Suppress] = 2.0
    parallel: Annotated[Parallel, tyro.conf.Suppress] = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        super().__post_init__()
        for way in self.ways:
            check_choice("the way", way, tuple(WAYS))
        check_number("relearn", self.relearn, least=1, whole=True)
        if self.retrained is None and "retrained" in self.ways:
            raise ValueError("the way is 'retrained', and no such model is given; give it as --retrained")
        self.relearning()

    def chosen(self) -> tuple[str, ...]:
        """Return the names of the ways to compare."""
        return self.ways or tuple(way for way in WAYS if way != "retrained" or self.retrained is not None)

    def relearning(self) -> Relearning:
        """Return how models are fine-tuned."""
        return Relearning(lr=self.lr, max_steps=self.max_steps)


@dataclass(frozen=True)
class _Texts:
    task: Task
    spared: Spared
    controls: list[MemorizedSequence]


def main() -> None:
    """Run the command line: ``memloc forgetting --help``."""
    run_command(parser(ForgettingSettings, "memloc forgetting", __doc__), run, show)


@may_be_quiet
def run(settings: ForgettingSettings) -> Forgetting:
    """Measure every way, and write `summary.json`.

    Raises:
        ValueError: for settings, files or models that cannot be used, before any long work.

    Example:
        >>> small = dict(limit=1, relearn=1, max_steps=1, context_sequences=4, negatives=4, text_tokens=256)
        >>> small |= dict(until="greedy", device="cpu")
        >>> settings = ForgettingSettings(ways=("gradient-ascent",), out=Path("forgetting"), **small)
        >>> run(settings)["ways"]["gradient-ascent"]["extracted"]
        0
    """
    with disk_errors(settings.out):
        settings.out.mkdir(parents=True, exist_ok=True)
        held = lock(settings.out)
    try:
        model = settings.load_model()
        texts = _texts(settings, model)
        with settings.memory_budget(model), fast_products(model.cfg.device):
            found = _run(settings, model, texts)
    finally:
        held.release()
    content = json.dumps(found, indent=1, allow_nan=False) + "\n"
    with disk_errors(settings.out):
        write_whole(settings.out / "summary.json", lambda part: part.write_text(content, "utf-8"))
    return found


def _texts(settings: ForgettingSettings, model: HookedModel) -> _Texts:
    """Load everything that is read.

    Raises:
        ValueError: if files cannot be used, or there are fewer new texts than sequences to relearn.
    """
    targets, spared, with_context = material(settings, model)
    (localizer,) = with_context.localizers()
    load = partial(load_sequences, model, prompt_len=settings.prompt_len, bos=settings.bos)
    controls = load(settings.controls) if settings.controls else load(settings.data, "control")
    count = min(settings.relearn, len(targets))
    if len(controls) < count:
        raise ValueError(
            f"{count} sequences are relearned, and there are {len(controls)} texts that were never seen; lower "
            "--relearn, or give more as --controls"
        )
    retrained = None
    if settings.retrained is not None:
        retrained = load_model(
            settings.retrained,
            device=settings.device,
            n_devices=settings.n_devices,
            dtype=model.cfg.dtype,
            backend=backend_of(model),
        )
    context = {id(each): each for each in context_of(localizer)}  # a wrapper and its localizer read the same
    task = Task(
        model,
        targets,
        list(context.values()),
        settings.out,
        until=settings.until,
        limit=settings.until_limit,
        first_layer=settings.first_layer,
        retrained=retrained,
        batch=settings.batch,
        seed=settings.seed,
    )
    return _Texts(task, spared, controls)


def _run(settings: ForgettingSettings, model: HookedModel, texts: _Texts) -> Forgetting:
    rows: dict[str, Row] = {}
    relearning = settings.relearning()
    for way in tqdm(settings.chosen(), desc="forget", unit="way"):
        file, of = settings.out / "ways" / f"{way}.json", _origin(settings, texts, way)
        row = _kept(file, of)
        if row is None:
            with WAYS[way](texts.task) as forgotten:
                row = _row(forgotten, texts, relearning, settings.relearn)
            _keep(file, of, row)
        rows[way] = row
    before = texts.spared.utility(model, settings.batch)
    return Forgetting(
        benchmark="forgetting",
        provenance=provenance(),
        sequences=[target.id for target in texts.task.targets],
        before=dict(extracted=_extracted(model, texts.task), perplexity=before.perplexity, accuracy=before.accuracy),
        relearning=asdict(relearning),
        ways=rows,
    )


def _row(forgotten: Forgotten, texts: _Texts, relearning: Relearning, count: int) -> Row:
    model, task = forgotten.model, texts.task
    count = min(count, len(task.targets))
    utility = texts.spared.utility(model, task.batch)
    learned = {
        kind: {own.id: relearning(model, own, [own]) for own in tqdm(part[:count], desc=kind, unit="text", leave=False)}
        for kind, part in (("erased", task.targets), ("new", texts.controls))
    }
    return Row(
        what=forgotten.what,
        seconds=forgotten.seconds,
        extracted=_extracted(model, task),
        left=cells(recitations(model, task.targets, batch=task.batch)),
        perplexity=utility.perplexity,
        accuracy=utility.accuracy,
        membership=membership(model, task.targets, texts.controls),
        relearned=learned,
        resurfacing=resurfacing(list(learned["erased"].values()), list(learned["new"].values())),
    )


def _extracted(model: HookedModel, task: Task) -> int:
    """Return how many sequences any prompt variant extracts."""
    return sum(extracted(model, prompts_of(model, task.targets), task.until, task.limit, task.batch))


def _origin(settings: ForgettingSettings, texts: _Texts, way: str) -> str:
    """Return a hash of what a row is computed from."""
    task, spared = texts.task, texts.spared
    read = [task.targets, task.context, spared.others, texts.controls]
    retrained = None if task.retrained is None or way != "retrained" else fingerprint(task.retrained)
    own = (task.until, task.limit, task.first_layer, task.seed, settings.dtype, settings.relearn)
    text = None if spared.text is None else spared.text.tolist()
    parts = [fingerprint(task.model), retrained, own, asdict(settings.relearning()), *map(identities, read), text]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _kept(file: Path, origin: str) -> Row | None:
    """Return the row that was measured before of the same; None if there is none."""
    if not file.is_file():
        return None
    found = read_table(file)
    return found["row"] if found.get("of") == origin else None


def _keep(file: Path, origin: str, row: Row) -> None:
    content = json.dumps({"of": origin, "by": provenance(), "row": row}, allow_nan=False)
    with disk_errors(file.parent):
        file.parent.mkdir(exist_ok=True)
        write_whole(file, lambda part: part.write_text(content, "utf-8"))


def show(settings: ForgettingSettings, found: Forgetting) -> None:
    """Print the table."""
    print_forgetting(found)
    print(f"\nall figures: {visible(settings.out / 'summary.json')}")


if __name__ == "__main__":
    main()
