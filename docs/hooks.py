"""MkDocs hooks: results become tables when the site is built, and the README's table is checked against them.

A line `<!-- results: NAME.json -->` in a page is replaced by the tables of `docs/results/NAME.json`, the
`summary.json` of a run, and by a line of provenance from `docs/results/NAME.provenance.toml`. A line
`<!-- include: FILE -->` is replaced by a file of the repository.

    python docs/hooks.py

writes the headline table of the README again, from the same files.
"""

import json
import posixpath
import re
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from memloc_lens.benchmarks.frontier import frontier_table
from memloc_lens.benchmarks.injection import metrics_at
from memloc_lens.benchmarks.measurement import METRICS
from memloc_lens.erase.forgetting import forgetting_table
from memloc_lens.tables.markdown import deletion_tables, injection_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
MARKER = re.compile(r"^<!-- results: ([\w-]+)\.json -->$", re.MULTILINE)
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
CARD = "memloc_lens/models/embedded/CARD.md"
HEADLINE = re.compile(r"(?<=<!-- made by docs/hooks\.py from docs/results -->\n).*?(?=<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[[Any], str]] = {
    "del": partial(deletion_tables, columns=METRICS),
    "inj": partial(injection_tables, columns_of=metrics_at),
    "frontier": frontier_table,
    "forgetting": forgetting_table,
}
"""The tables of each kind of result."""
PROVENANCE = ("command", "commit", "machine", "date")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the markers of a page."""
    markdown = INCLUDE.sub(lambda match: included(match[1]), markdown)
    folder = posixpath.dirname(page.file.src_uri)
    return MARKER.sub(lambda match: tables(match[1], posixpath.relpath("results", folder or ".")), markdown)


def included(name: str) -> str:
    """Return a file of the repository with its links changed to pages of the site."""
    text = (ROOT / name).read_text("utf-8")
    return text.replace(f"]({CARD})", "](embedded-model.md)").replace("](docs/", "](")


def tables(name: str, link: str = ".") -> str:
    """Return the tables of a result with a line of provenance.

    Args:
        name: of the file without its suffix.
        link: relative path from the page to the folder of results.
    """
    summary = _summary(name)
    made = TABLES[summary["benchmark"]](summary)
    source = provenance(name)
    line = (
        f"`{source['command']}`, commit {source['commit']}, {source['machine']}, {source['date']}. "
        f"All metrics: [{name}.json]({link}/{name}.json)."
    )
    return f"{made}\n\n{line}"


def provenance(name: str) -> dict[str, Any]:
    """Return the command, commit, machine and date of a result.

    Raises:
        ValueError: if one of them is missing.
    """
    file = RESULTS / f"{name}.provenance.toml"
    found = tomllib.loads(file.read_text("utf-8"))
    missing = [field for field in PROVENANCE if field not in found]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; results need their command, commit, machine and date")
    return found


def headline() -> str:
    """Return the headline table of the README: DEL at 10%, and INJ at 5% with the norms kept."""
    deletion = _summary("del-embedded")["methods"]
    injection = _summary("inj-embedded-keep-norms")["methods"]
    at_del, at_inj = "0.1", "0.05"
    lines = [
        "| method | DEL: Self-Acc | Neg-Acc | PPL | INJ: Recall@5% | AUROC |",
        "|---|---|---|---|---|---|",
    ]
    for method in deletion:
        cells = deletion[method][at_del]
        shown = [f"{cells[name]['mean']:+.1f}" for name in ("self_acc", "neg_acc", "ppl")]
        found = injection[method][at_inj]
        shown += [f"{found['recall@0.05']['mean']:.1f}", f"{found['auroc']['mean']:.3f}"]
        lines.append(_row(method, shown))
    return "\n".join(["", *lines, "", ""])


def _row(method: str, cells: Sequence[str]) -> str:
    return f"| {method} | {' | '.join(cells)} |"


def _summary(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(HEADLINE.sub(lambda match: headline(), readme.read_text("utf-8")), "utf-8")
