"""The page itself: a template, a style sheet and a script, with the libraries inlined once."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from memloc_lens.erase.page import Part
from memloc_lens.report.neurons import NeuronCard
from memloc_lens.report.pictures import Missing, Picture
from memloc_lens.report.summaries import Table
from memloc_lens.runs.visible import visible

LIBRARIES = {"plotly": ("plotly", "package_data/plotly.min.js"), "circuitsvis": ("circuitsvis", "dist/cdn/iife.js")}


@dataclass
class RunSection:
    """What the page tells about a run; names of sequences, methods and files may be anything."""

    template = "run.html"

    name: str
    benchmark: str
    about: dict[str, Any]
    tables: list[Table]
    pictures: list[Picture | Missing]
    cards: list[dict[str, Any]] = field(default_factory=list)
    neurons: list[NeuronCard] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What the section is about."""
        return self.benchmark.upper()


@dataclass
class ErasureSection:
    """What the page tells about an erased checkpoint and its audit; any text in it may be anything."""

    template = "erasure.html"
    kind = "Erasure"

    name: str
    parts: list[Part]
    pictures: list[Picture | Missing]
    cards: Sequence[dict[str, Any]] = ()


Section = RunSection | ErasureSection


def render(sections: Sequence[Section]) -> str:
    """Return the page as HTML that makes no request.

    Args:
        sections: one a run or an erased checkpoint.
    """
    environment = Environment(
        loader=PackageLoader("memloc_lens.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "sentence": sentence}
    data = script_json([{"cards": section.cards, "figures": _figures(section)} for section in sections])
    page = environment.get_template("page.html").render(
        sections=sections,
        data=data,
        # only scripts with this mark run, whatever a text may hold; a page's mark cannot be guessed from outside it
        nonce=sha256(data.encode()).hexdigest()[:32],
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        libraries={name: library(name) for name in LIBRARIES},
    )
    return page


def _figures(section: Section) -> dict[str, Any]:
    return {each.name: json.loads(each.figure.to_json()) for each in section.pictures if isinstance(each, Picture)}


def sentence(text: str) -> Markup:
    """Return a sentence as HTML, what it has between backticks as code.

    Example:
        >>> from memloc_lens.report.page import sentence
        >>> print(sentence("`a < b` & c"))
        <code>a &lt; b</code> &amp; c
    """
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(visible(text)))))


def script_json(value: Any) -> Markup:
    """Return JSON to stand in a script element, which no text in it can end.

    Example:
        >>> from memloc_lens.report.page import script_json
        >>> print(script_json("</script>"))
        "\\u003c/script>"
    """
    text = json.dumps(value, separators=(",", ":"))  # ASCII: what a page may not hold is escaped
    return Markup(text.replace("<", "\\u003c"))


@cache
def library(name: str) -> Markup:
    """Return the source of a library, such that it can stand in a script element."""
    package, path = LIBRARIES[name]
    source = files(package).joinpath(path).read_text(encoding="utf-8")
    return Markup(re.sub(r"</(script)", r"<\\/\1", source, flags=re.IGNORECASE).replace("<!--", r"<\!--"))


def _file(name: str) -> str:
    return files("memloc_lens.report").joinpath(name).read_text(encoding="utf-8")
