"""Text of unknown origin (ids, paths, categories) as it is written, on a terminal and in Markdown."""

import re

from rich.text import Text

from memloc_lens.markup import visible as visible

MARKDOWN = re.compile(r"([\\`*_\[\]])")


def plain(text: object) -> Text:
    """Return text for rich's tables: not read as markup or emoji codes."""
    return Text(visible(text))


def markdown(text: object) -> str:
    r"""Return text for Markdown: its special characters escaped, as a page shows them.

    Example:
        >>> print(markdown("<b> *x* [y]"))
        &lt;b&gt; \*x\* \[y\]
    """
    escaped = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("~", "&#126;")
    return MARKDOWN.sub(r"\\\1", escaped)
