"""Find sequences of a corpus that a model has memorized, and write them as a data set for the benchmarks.

Chang et al. (2024), app. A, on windows of a prompt and a suffix:

1. Teacher-forced: the share of the suffix that is the likeliest token given all before it reaches `min_accuracy`.
2. Distinct: the suffix, and the suffix as the model generates it, have at least `min_distinct` different tokens.
3. Greedy: what the model generates from the prompt alone is within `max_distance` of the suffix.
4. Near-duplicates: of all that share 5-grams, directly or through others, the one generated best stays.

Memorized text is told apart from text that can be guessed: a sequence is set aside as `guessable` if the model comes as
close to its suffix from a prompt of other text, or from its own with the tokens shuffled, or if most of the suffix is
copied from what stands before it. The rest is split into `dev` and `test`.

    python -m memloc_lens.data.find --model smollm2-135m --corpus /usr/share/common-licenses --min-accuracy 0.7

A run that was stopped goes on where it was when started again with the same settings. `--data OUT/sequences.jsonl`
gives the result to the benchmarks.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rapidfuzz.distance import Levenshtein
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformer_lens import HookedTransformer

from memloc_lens.benchmarks.records import RunFolder
from memloc_lens.data.corpus import Window, read_corpus, windows_of
from memloc_lens.data.near_duplicates import near_duplicate_groups
from memloc_lens.metrics import free_running, suffix_accuracy, teacher_forced
from memloc_lens.models import EMBEDDED, load_model
from memloc_lens.products import fast_products
from memloc_lens.sequence import MemorizedSequence, decode

COPIED_GRAM = 3
COPIED_SHARE = 0.5


@dataclass(frozen=True)
class Settings:
    """What to search, and what counts as memorized.

    Args:
        corpus: Text files, folders, JSON lines, .pt files of token ids, or owner/name:split of data sets on the hub.
        model: "embedded", "smollm2-135m", a folder in transformers format, a .gguf file or a name on the hub.
        out: Folder of the run and of its result, sequences.jsonl.
        names: Of the files to take from folders, with wildcards.
        prompt: Tokens of the prompt.
        suffix: Tokens of the suffix.
        stride: Tokens from the start of a window to that of the next; 0: the windows stand side by side.
        limit: Windows to look at, different ones; 0 looks at all.
        min_accuracy: Share of the suffix that must be right, teacher-forced, from 0 to 1; the paper's is 0.9.
        max_distance: Levenshtein distance of the generated suffix at the most, in characters, or in tokens for a
            model without a tokenizer; the paper's is 20. A negative number asks for none.
        min_distinct: Different tokens in the suffix at the least, the true one and the generated.
        near_duplicate: Jaccard index of 5-grams above which two sequences are near-duplicates.
        dev: Sequences set aside for choosing settings, drawn at random.
        seed: Of that draw and of the shuffled prompts.
        batch: Windows at a time, at the most.
        device: Left out: CUDA where there is one, else the CPU.
        dtype: Precision of weights and computation.
    """

    corpus: tuple[str, ...]
    model: str = EMBEDDED.name
    out: Path = Path("runs/found")
    names: tuple[str, ...] = ("*",)
    prompt: int = 32
    suffix: int = 48
    stride: int = 0
    limit: int = 0
    min_accuracy: float = 0.9
    max_distance: int = 20
    min_distinct: int = 16
    near_duplicate: float = 0.05
    dev: int = 5
    seed: int = 0
    batch: int = 32
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"


def main() -> None:
    """The command line: ``python -m memloc_lens.data.find --help``."""
    settings = tyro.cli(Settings, prog="python -m memloc_lens.data.find", description=__doc__)
    try:
        report = run(settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; what was found is kept: the same command goes on from there")
    show(report)
    print(f"\nthe sequences: {settings.out / 'sequences.jsonl'}")


def run(settings: Settings) -> dict[str, Any]:
    """Search the corpus, or what is left of it, and write `sequences.jsonl` and `report.json`.

    Returns:
        The settings and, under "counts", how many windows or sequences every step left.

    Raises:
        ValueError: for settings, a corpus or a run folder that cannot be used, or a corpus too short or since changed.
    """
    _check(settings)
    model = load_model(settings.model, device=settings.device, dtype=getattr(torch, settings.dtype))
    length = settings.prompt + settings.suffix
    if length > model.cfg.n_ctx:
        raise ValueError(f"prompt and suffix are {length} tokens, and {settings.model} reads at most {model.cfg.n_ctx}")
    config = json.loads(json.dumps(asdict(settings), default=str))
    folder = RunFolder(settings.out, {**config, "device": str(model.cfg.device), "memloc_lens": version("memloc-lens")},
                       key=("step", "item"))  # fmt: skip
    with fast_products(model.cfg.device):
        counts, accurate = _scan(settings, model, folder)
        recalled = _recall(settings, model, folder, accurate)
        varied = [each for each in recalled if each["distinct"] >= settings.min_distinct]
        counts["generated with enough distinct tokens"] = len(varied)
        close = [each for each in varied if settings.max_distance < 0 or each["distance"] <= settings.max_distance]
        counts["generated within the distance"] = len(close)
        distinct = _without_near_duplicates(settings, close)
        counts["without near-duplicates"] = len(distinct)
        guessed = _guess(settings, model, folder, distinct)
    sequences = _split(settings, guessed)
    for split in ("guessable", "dev", "test"):
        counts[split] = sum(each["split"] == split for each in sequences)
    lines = [json.dumps(_row(model, settings, number, each)) for number, each in enumerate(sequences, start=1)]
    folder.write("sequences.jsonl", "".join(line + "\n" for line in lines))
    report = {"settings": config, "unit": "characters" if model.tokenizer else "tokens", "counts": counts}
    folder.write("report.json", json.dumps(report, indent=1) + "\n")
    return report


def _check(settings: Settings) -> None:
    for name, least in (("prompt", 1), ("suffix", 1), ("stride", 0), ("limit", 0), ("batch", 1), ("dev", 0)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be {least} or more")
    for name in ("min_accuracy", "near_duplicate"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it is a share, from 0 to 1")
    if settings.min_distinct > settings.suffix:
        raise ValueError(f"min_distinct is {settings.min_distinct}, and the suffix has only {settings.suffix} tokens")
    if not settings.corpus:
        raise ValueError("no corpus was given")


def _distinct_windows(settings: Settings, model: HookedTransformer, counts: dict[str, int]) -> Iterator[Window]:
    """Windows without exact duplicates; what is passed over is counted."""
    seen: set[int] = set()
    documents = read_corpus(settings.corpus, settings.names)
    length = settings.prompt + settings.suffix
    for window in windows_of(model, documents, length, settings.stride or length):
        counts["windows"] += 1
        fingerprint = hash(window.tokens)
        if fingerprint not in seen:
            seen.add(fingerprint)
            yield window


def _scan(
    settings: Settings, model: HookedTransformer, folder: RunFolder
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The windows that pass the first two filters, a record a batch, and the counts of what did not."""
    counts = dict.fromkeys(("windows", "without exact duplicates", "accurate", "with enough distinct tokens"), 0)
    windows = islice(_distinct_windows(settings, model, counts), settings.limit or None)
    passed: list[dict[str, Any]] = []
    with tqdm(total=settings.limit or None, desc="teacher-forced", unit="window", smoothing=0.1) as progress:
        for number, batch in enumerate(iter(lambda: list(islice(windows, settings.batch)), [])):
            if ("scan", number) not in folder:
                folder.append({"step": "scan", "item": number, **_scanned(settings, model, batch)})
            record = folder[("scan", number)]
            if record["ends"] != _ends(batch):
                raise ValueError(f"the corpus is not the one that {settings.out} was begun with; choose another --out")
            counts["without exact duplicates"] += len(batch)
            counts["accurate"] += record["accurate"]
            counts["with enough distinct tokens"] += len(record["passed"])
            passed += record["passed"]
            progress.update(len(batch))
            progress.set_postfix_str(f"{counts['accurate']} accurate")
    if not counts["windows"]:
        raise ValueError(
            f"the corpus has no window of {settings.prompt + settings.suffix} tokens; give more text or shorten "
            "prompt and suffix"
        )
    return counts, passed


def _scanned(settings: Settings, model: HookedTransformer, windows: Sequence[Window]) -> dict[str, Any]:
    sequences = [MemorizedSequence(torch.tensor(window.tokens), settings.prompt) for window in windows]
    for window, sequence in zip(windows, sequences, strict=True):
        try:
            sequence.check_fits(model)
        except ValueError as error:
            raise ValueError(f"{window.source}: {error}") from error
    accuracies = suffix_accuracy(teacher_forced(model, sequences, settings.batch), sequences).tolist()
    accurate = [
        asdict(window) | {"tokens": list(window.tokens), "accuracy": round(accuracy, 2)}
        for window, accuracy in zip(windows, accuracies, strict=True)
        if accuracy > 100 * settings.min_accuracy - 1e-4  # accuracies are float32: 7 of 10 is a little under 70
    ]
    passed = [each for each in accurate if len(set(each["tokens"][settings.prompt :])) >= settings.min_distinct]
    return {"ends": _ends(windows), "accurate": len(accurate), "passed": passed}


def _ends(batch: Sequence[Window]) -> list[int]:
    """The first and the last tokens of a batch: enough to tell one corpus from another."""
    return [*batch[0].tokens[:8], *batch[-1].tokens[-8:]]


def _recall(
    settings: Settings, model: HookedTransformer, folder: RunFolder, windows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each window with what the model generates from its prompt: the distance, and how many distinct tokens."""
    prompts = [window["tokens"][: settings.prompt] for window in windows]

    def measure(window: dict[str, Any], generated: list[int]) -> dict[str, Any]:
        distance = _distance(model, generated, window["tokens"][settings.prompt :])
        return {"distance": distance, "distinct": len(set(generated))}

    return _generated(settings, model, folder, "recall", windows, prompts, measure)


def _guess(
    settings: Settings, model: HookedTransformer, folder: RunFolder, windows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each window with how close the model comes from another prompt, and why it is guessable, if it is."""
    draw = random.Random(settings.seed)
    shuffled = [draw.sample(window["tokens"][: settings.prompt], settings.prompt) for window in windows]
    foreign = [window["tokens"][: settings.prompt] for window in windows[1:] + windows[:1]]
    found = windows
    for name, prompts in (("shuffled", shuffled), ("foreign", foreign)):
        if name == "foreign" and len(windows) < 2:
            continue

        def measure(window: dict[str, Any], generated: list[int], name: str = name) -> dict[str, Any]:
            return {f"{name}_distance": _distance(model, generated, window["tokens"][settings.prompt :])}

        found = _generated(settings, model, folder, name, found, prompts, measure)
    return [each | {"guessable": _reasons(settings, each)} for each in found]


def _reasons(settings: Settings, window: dict[str, Any]) -> list[str]:
    """Why a suffix could be guessed: from which prompt, or because it repeats itself."""
    near = max(window["distance"], settings.max_distance)
    reasons = [f"{name} prompt" for name in ("shuffled", "foreign") if window.get(f"{name}_distance", near + 1) <= near]
    copied = copied_share(window["tokens"], settings.prompt)
    return [*reasons, "repetitive"] if copied >= COPIED_SHARE else reasons


def copied_share(tokens: Sequence[int], prompt_len: int) -> float:
    """The share of a suffix that copies: tokens that follow the same two tokens as they did before.

    Example:
        >>> copied_share([1, 2, 3, 1, 2, 3, 1, 2], prompt_len=4)
        0.75
    """
    seen: set[tuple[int, ...]] = set()
    copied = 0
    for end in range(COPIED_GRAM, len(tokens) + 1):
        gram = tuple(tokens[end - COPIED_GRAM : end])
        copied += end > prompt_len and gram in seen
        seen.add(gram)
    return copied / (len(tokens) - prompt_len)


def _generated(
    settings: Settings,
    model: HookedTransformer,
    folder: RunFolder,
    step: str,
    windows: list[dict[str, Any]],
    prompts: list[list[int]],
    measure: Callable[[dict[str, Any], list[int]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Windows with what `measure` makes of the greedy suffix after a prompt, recorded batch by batch."""
    measured: list[dict[str, Any]] = []
    pairs = list(zip(windows, prompts, strict=True))
    batches = [pairs[start : start + settings.batch] for start in range(0, len(pairs), settings.batch)]
    for number, batch in enumerate(tqdm(batches, desc=f"generating, {step}", unit="batch", disable=not batches)):
        if (step, number) not in folder:
            sequences = [
                MemorizedSequence(torch.tensor([*prompt, *window["tokens"][settings.prompt :]]), settings.prompt)
                for window, prompt in batch
            ]
            suffixes = free_running(model, sequences, settings.batch)
            values = [measure(window, suffix.tolist()) for (window, _), suffix in zip(batch, suffixes, strict=True)]
            folder.append({"step": step, "item": number, "values": values})
        measured += folder[(step, number)]["values"]
    return [window | values for window, values in zip(windows, measured, strict=True)]


def _distance(model: HookedTransformer, generated: list[int], suffix: list[int]) -> int:
    """Levenshtein distance of two suffixes, in characters where the model can write them, else in tokens."""
    if model.tokenizer is None:
        return Levenshtein.distance(generated, suffix)
    return Levenshtein.distance(*(decode(model, torch.tensor(tokens)) for tokens in (generated, suffix)))


def _without_near_duplicates(settings: Settings, windows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every group of near-duplicates the one that is generated best; the more accurate of two, and the first."""
    groups = near_duplicate_groups([window["tokens"] for window in windows], settings.near_duplicate).tolist()
    best: dict[int, dict[str, Any]] = {}
    for group, window in zip(groups, windows, strict=True):
        if group not in best or _goodness(window) < _goodness(best[group]):
            best[group] = window
    return list(best.values())


def _goodness(window: dict[str, Any]) -> tuple[int, float]:
    return window["distance"], -window["accuracy"]


def _split(settings: Settings, windows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    memorized = [place for place, window in enumerate(windows) if not window["guessable"]]
    dev = set(random.Random(settings.seed).sample(memorized, min(settings.dev, len(memorized))))
    return [
        window | {"split": "guessable" if window["guessable"] else "dev" if place in dev else "test"}
        for place, window in enumerate(windows)
    ]


def _row(model: HookedTransformer, settings: Settings, number: int, window: dict[str, Any]) -> dict[str, Any]:
    """A line of the data set: the sequence, where it is from, and every number that it was judged by."""
    texts = {}
    if model.tokenizer is not None:
        tokens = torch.tensor(window["tokens"])
        texts = {"prompt": decode(model, tokens[: settings.prompt]), "all": decode(model, tokens)}
    return {"id": f"found-{number:04d}", **texts, "prompt_len": settings.prompt, **window}


def show(report: dict[str, Any]) -> None:
    """Print how many windows and sequences every step left."""
    table = Table(title=f"{report['settings']['model']}: what is left after every step", title_justify="left")
    table.add_column("")
    table.add_column("left", justify="right")
    for name, count in report["counts"].items():
        table.add_row(name, str(count))
    Console().print(table)


if __name__ == "__main__":
    main()
