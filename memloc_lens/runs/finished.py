"""Read a finished run: the one reader of agreement, specificity and whatever else looks at run folders."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from memloc_lens.runs.folder import read_config
from memloc_lens.runs.records import broken_seal, read_records, read_table
from memloc_lens.runs.schema import BEFORE, Record
from memloc_lens.runs.scores import read_scores, score_file


@dataclass(frozen=True)
class FinishedRun:
    """A run folder with its summary.

    Args:
        path: of the folder.
        config: its `config.json`.
        summary: its `summary.json`.
        records: of the methods and ratios in the summary; those of states before an ablation and of injections are
            left out, and those of a later run that is not finished.
        before: the records of the state before any ablation, by sequence; none in a run of INJ.
    """

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    records: list[Record]
    before: dict[str, Record] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """The methods that have records, in their order."""
        return list(dict.fromkeys(record["method"] for record in self.records))

    @property
    def ratios(self) -> list[float]:
        """The ratios that have records, ascending."""
        return sorted({record["ratio"] for record in self.records})

    def check_ratio(self, ratio: float | None, default: float | None) -> float:
        """Return the ratio, or the default if none is given.

        Raises:
            ValueError: if the run has no records at the ratio.
        """
        chosen = default if ratio is None else ratio
        if chosen is None or chosen not in self.ratios:
            raise ValueError(
                f"{self.path} has no records at the ratio {ratio}; it has {', '.join(map(str, self.ratios)) or 'none'}"
            )
        return chosen

    def check_method(self, method: str) -> str:
        """Return the method.

        Raises:
            ValueError: if the run has no records of it.
        """
        if method not in self.methods:
            raise ValueError(f"{self.path} has no method {method!r}; it has {', '.join(self.methods)}")
        return method

    def at(self, method: str, ratio: float) -> dict[str, Record]:
        """Return the record of each sequence of a method at a ratio."""
        return {
            record["sequence"]: record
            for record in self.records
            if (record["method"], record["ratio"]) == (method, ratio)
        }

    def scores(self, method: str, *parts: float | int, of: str | None = None) -> dict[str, torch.Tensor]:
        """Return the tensors of a score file.

        Args:
            method: name of the method.
            parts: of the name of the file.
            of: what they must have been computed from, as `origin` says. Default: anything.

        Raises:
            ValueError: if the file is missing or damaged, or holds the scores of something else.
        """
        file = score_file(self.path, method, *parts)
        try:
            return read_scores(file, of)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} holds no scores: {error}") from error


def read_run(folder: Path, benchmark: str) -> FinishedRun:
    """Read a finished run of a benchmark.

    Args:
        folder: of the run.
        benchmark: "del" or "inj".

    Raises:
        ValueError: if the folder holds no finished run, or one of another benchmark.
    """
    try:
        config = read_config(folder) or {}
        summary = read_table(folder / "summary.json")
        is_summarized = _summarized(folder, config, summary, benchmark)
        records = read_records(
            folder / "records.jsonl",
            problem=lambda record: broken_seal(record) if _is_before(record) or is_summarized(record) else None,
        )
    except OSError as error:
        raise ValueError(f"{folder} holds no finished run: {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{folder} holds no finished run: {error}") from error
    before = {record["sequence"]: record for record in filter(_is_before, records)}
    return FinishedRun(folder, config, summary, list(filter(is_summarized, records)), before)


def _is_before(record: Record) -> bool:
    return record["method"] == BEFORE


def _summarized(
    folder: Path, config: dict[str, Any], summary: dict[str, Any], benchmark: str
) -> Callable[[Record], bool]:
    """Return a function that tells whether a record is of the methods, ratios and sequences of the summary.

    Raises:
        ValueError: if the summary is of another benchmark, or damaged.
    """
    if summary.get("benchmark") != benchmark:
        raise ValueError(f"{folder} is a run of {summary.get('benchmark')}; give one of {benchmark}")
    methods, count = summary.get("methods"), summary.get("sequences")
    if not isinstance(methods, dict) or not all(isinstance(cells, dict) for cells in methods.values()):
        raise ValueError(f"{folder / 'summary.json'} has no methods; repeat the run to write it again")
    known = {id for id, _ in config.get("sequences", [])[: count if isinstance(count, int) else None]}

    def is_summarized(record: Record) -> bool:
        ratios = methods.get(record["method"], {})
        return str(record["ratio"]) in ratios and (not known or record["sequence"] in known)

    return is_summarized
