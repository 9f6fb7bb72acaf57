"""Runs with hostile names, and a reader of pages that knows nothing of how they were made."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from conftest import write_lines
from memloc_lens.benchmarks import deletion
from memloc_lens.benchmarks.deletion import DeletionSettings

HOSTILE = (
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "\u202eright to left",
    "line\u2028separator",
    "a\x00b",
    "private \ue000 use",
)


def hostile_run(settings: DeletionSettings, folder: Path) -> Path:
    """Run DEL on sequences whose ids and categories are hostile, the last category a megabyte long."""
    rows = [json.loads(line) for line in Path(settings.data).read_text().splitlines()]
    for row, text in zip(rows, HOSTILE, strict=False):
        row |= {"id": text, "category": [text]}
    rows[5]["category"] = ["x" * 2**20]
    data = write_lines(folder / "hostile.jsonl", rows)
    methods = ("activations", "gradient", "random")
    deletion.run(replace(settings, data=data, limit=6, methods=methods, out=folder / "<b>run"))
    return folder / "<b>run"


class Page(HTMLParser):
    """The tables of a page as lists of rows of (text, data-value), the scripts, and all other text.

    Tables without a caption are by the label of the region that they are in; what is small in a cell is left out.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.regions: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._rows: list[list[tuple[str, str | None]]] = []
        self._path: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag in ("meta", "input"):
            return
        self._path.append(tag)
        if found.get("role") == "region":
            self.regions[found["aria-label"]] = self._rows = []
        elif tag == "table" and self._rows:
            self._rows = []
        elif tag == "caption":
            self.tables[""] = self._rows
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(("", found.get("data-value")))
        elif tag == "script":
            self.scripts.append((found, ""))

    def handle_endtag(self, tag):
        assert self._path.pop() == tag

    def handle_data(self, data):
        if self._path[-1:] == ["script"]:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
            return
        self.text += data
        if "caption" in self._path:
            self.tables[data.strip()] = self.tables.pop("")
        elif {"td", "th"} & set(self._path) and "small" not in self._path:
            text, value = self._rows[-1][-1]
            self._rows[-1][-1] = ((text + data).strip(), value)
