"""Find sequences of a corpus that a model has memorized, and write them as a data set for the benchmarks.

Chang et al. (2024), app. A, on windows of a prompt and a suffix:

1. Teacher-forced: the share of suffix tokens that the model predicts, given all tokens before, reaches `min_accuracy`.
2. Distinct: the suffix, and the suffix as the model generates it, have at least `min_distinct` different tokens.
3. Greedy: what the model generates from the prompt alone is within `max_distance` of the suffix.
4. Near-duplicates: of all sequences that share 5-grams, directly or through others, the one generated best is kept.

Some suffixes can be guessed. A sequence gets the split `guessable` if the model comes as close to its suffix from the
prompt of another window, or from its own prompt with the tokens shuffled, or if most of the suffix is copied from what
stands before it. The other sequences are split into `dev` and `test`.

    python -m memloc_lens.data.find --model smollm2-135m --corpus /usr/share/common-licenses --min-accuracy 0.7

An interrupted run resumes when you repeat the command. `--data OUT/sequences.jsonl` gives the result to the benchmarks.
"""

import json
import random
from itertools import islice
from typing import Literal, get_args

import torch
from rich.console import Console
from rich.table import Table

from memloc_lens.data.corpus import read_corpus
from memloc_lens.data.found import Counts, FindSettings, FoundSequence, FoundWindow, Report, Split
from memloc_lens.data.guessing import foreign_prompts, shuffled_prompts, why_guessable
from memloc_lens.data.readers import is_local
from memloc_lens.data.search import Search, begin, digest_of, generate, scan
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.folder import resuming
from memloc_lens.runs.jobs import Engine
from memloc_lens.runs.quiet import may_be_quiet
from memloc_lens.runs.visible import plain, visible
from memloc_lens.sequence import MemorizedSequence, begins_with_bos, decode


def main() -> None:
    """Run the command line: ``python -m memloc_lens.data.find --help``."""
    run_command(parser(FindSettings, "python -m memloc_lens.data.find", __doc__), run, show)


@may_be_quiet
def run(settings: FindSettings, engine: Engine | None = None) -> Report:
    """Search the corpus, or what is left of it, and write `sequences.jsonl` and `report.json`.

    Args:
        settings: of the run. They must equal those of an earlier run in the same folder; the limit may be another.
        engine: runs the jobs. Default: that of the settings.

    Returns:
        The content of `report.json`.

    Raises:
        ValueError: for settings, a corpus or a run folder that cannot be used, or a corpus that is too short or has
            changed since the run began.
    """
    with resuming(settings.out):
        search = begin(settings, engine, documents=_check_files(settings))
        with search.folder:
            return _run(search)


def _run(search: Search) -> Report:
    settings = search.settings
    counts, accurate = scan(search)
    windows = generate(search, "greedy", accurate, _prompts(search, accurate))
    windows = [window for window in windows if window["distinct"] >= settings.min_distinct]
    counts["generated with enough distinct tokens"] = len(windows)
    windows = [window for window in windows if _is_close(settings, window["distance"])]
    counts["generated within the distance"] = len(windows)
    windows = _without_near_duplicates(settings, windows)
    counts["without near-duplicates"] = len(windows)
    windows = _with_splits(settings, _with_guesses(search, windows))
    for split in get_args(Split):
        counts[split] = sum(window["split"] == split for window in windows)
    return _write(search, counts, windows)


def _check_files(settings: FindSettings) -> str:
    """Read the files of the corpus once, so that one that cannot be used is refused before any long work.

    With a limit only the first document of each source is read: the search may never reach the others.

    Returns:
        A hash of what was read.
    """
    return digest_of(
        (document.source, document.category, document.content)
        for source in filter(is_local, settings.corpus)
        for document in islice(read_corpus([source], settings.names), 1 if settings.limit else None)
    )


def _is_close(settings: FindSettings, distance: int) -> bool:
    return settings.max_distance < 0 or distance <= settings.max_distance


def _prompts(search: Search, windows: list[FoundWindow]) -> list[list[int]]:
    return [window["tokens"][: search.settings.prompt] for window in windows]


def _with_guesses(search: Search, windows: list[FoundWindow]) -> list[FoundWindow]:
    """Return the windows with their distances from other prompts, and with why they can be guessed."""
    own = _prompts(search, windows)
    windows = generate(search, "shuffled", windows, shuffled_prompts(own, search.settings.seed))
    foreign = foreign_prompts(own)
    if foreign:
        windows = generate(search, "foreign", windows, foreign)
    return [{**window, "guessable": why_guessable(search.settings, window)} for window in windows]


def _without_near_duplicates(settings: FindSettings, windows: list[FoundWindow]) -> list[FoundWindow]:
    """Keep of every group of near-duplicates the one generated best, then the more accurate, then the first."""
    from memloc_lens.data.near_duplicates import near_duplicate_groups

    groups = near_duplicate_groups([window["tokens"] for window in windows], settings.near_duplicate).tolist()
    best: dict[int, FoundWindow] = {}
    for group, window in zip(groups, windows, strict=True):
        if group not in best or _badness(window) < _badness(best[group]):
            best[group] = window
    return list(best.values())


def _badness(window: FoundWindow) -> tuple[int, float]:
    return window["distance"], -window["accuracy"]


def _with_splits(settings: FindSettings, windows: list[FoundWindow]) -> list[FoundWindow]:
    """Return the windows with their splits; those of `dev` are drawn from the memorized ones."""
    memorized = [index for index, window in enumerate(windows) if not window["guessable"]]
    dev = set(random.Random(settings.seed).sample(memorized, min(settings.dev, len(memorized))))

    def split_of(index: int, window: FoundWindow) -> Split:
        if window["guessable"]:
            return "guessable"
        return "dev" if index in dev else "test"

    return [{**window, "split": split_of(index, window)} for index, window in enumerate(windows)]


def _write(search: Search, counts: Counts, windows: list[FoundWindow]) -> Report:
    """Write the data set and the report, and return the report."""
    rows = [_row(search, number, window) for number, window in enumerate(windows, start=1)]
    search.folder.write("sequences.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    unit: Literal["characters", "tokens"] = "tokens" if search.model.tokenizer is None else "characters"
    report: Report = {"settings": search.settings.as_json(), "unit": unit, "counts": counts}
    search.folder.write("report.json", json.dumps(report, indent=1) + "\n")
    return report


def _row(search: Search, number: int, window: FoundWindow) -> FoundSequence:
    """Return the line of a window. Its tokens are those that the model read; its texts are those of the corpus."""
    id, prompt_len = f"found-{number:04d}", search.settings.prompt
    if search.model.tokenizer is None:
        return {"id": id, "prompt_len": prompt_len, **window}
    own = MemorizedSequence(torch.tensor(window["tokens"]), prompt_len)
    prompt, text = decode(search.model, own.prompt[0]), own.text(search.model)
    read = own.after_bos(search.model) if begins_with_bos(search.model, search.settings.bos) else own
    tokens = read.tokens.tolist()
    return {"id": id, "prompt": prompt, "all": text, "prompt_len": read.prompt_len, **window, "tokens": tokens}


def show(settings: FindSettings, report: Report) -> None:
    """Print how many windows and sequences every step left."""
    table = Table(title=plain(f"{settings.model}: what is left after every step"), title_justify="left")
    table.add_column("")
    table.add_column("left", justify="right")
    for name, count in report["counts"].items():
        table.add_row(name, str(count))
    Console().print(table)
    print(f"\nsequences: {visible(settings.out / 'sequences.jsonl')}")


if __name__ == "__main__":
    main()
