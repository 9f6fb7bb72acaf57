import html
import re

import markdown as python_markdown
import pytest
from rich.console import Console
from rich.table import Table

from memloc_lens.runs.visible import markdown, plain, visible

HOSTILE = [
    "[/]x", "m[a]", "[bold red]x[/]", "[/nope]", "\\[a]", ":bomb:", "a\\", "<b>x</b>", "&lt;", "*x*", "_x_", "`x`",
    "a|b", "~~x~~", "[x](y)", "![x](y)", "é 漢", "# x", "$x$",
]  # fmt: skip
CONTROL = {"\x1b[31mx": r"\x1b[31mx", "a\nb": r"a\nb", "a\u202eb": r"a\u202eb", "a\rb": r"a\rb", "a\x00b": r"a\x00b",
           "a\u2028b": r"a\u2028b", "\ud800": r"\ud800", "\x9b31m": r"\x9b31m", "\u200b": r"\u200b"}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_can_be_seen_stays(text):
    assert visible(text) == text


@pytest.mark.parametrize(("text", "seen"), CONTROL.items(), ids=repr)
def test_what_terminals_obey_is_made_visible(text, seen):
    assert visible(text) == seen


@pytest.mark.parametrize("text", [*HOSTILE, *CONTROL])
def test_a_table_shows_text_as_it_is_written(text, capsys):
    table = Table(title=plain(text))
    table.add_column("name")
    table.add_row(plain(text))
    Console(width=80).print(table, plain(text))
    assert capsys.readouterr().out.count(visible(text)) == 3


@pytest.mark.parametrize("text", [*HOSTILE, *CONTROL])
def test_markdown_shows_text_as_it_is_written(text):
    page = python_markdown.markdown(f"model {markdown(text)}.", extensions=["tables"])
    assert html.unescape(re.fullmatch(r"<p>model (.*)\.</p>", page, re.DOTALL)[1]) == visible(text)
