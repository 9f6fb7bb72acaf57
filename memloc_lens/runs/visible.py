"""Text of unknown origin (ids, paths, categories) as it is written, also on a terminal and in Markdown."""

import re

from rich.text import Text

MARKDOWN = re.compile(r"([\\`*_\[\]~])")


def visible(text: object) -> str:
    r"""Return text in one line, with control and format characters as escapes, so that a terminal does not obey them.

    Example:
        >>> print(visible("red \x1b[31m, right to left \u202e, a line\n"))
        red \x1b[31m, right to left \u202e, a line\n
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in str(text)
    )


def plain(text: object) -> Text:
    """Return text for rich's tables: not read as markup or emoji codes."""
    return Text(visible(text))


def markdown(text: object) -> str:
    r"""Return text for Markdown: its special characters escaped, as a page shows them.

    Example:
        >>> print(markdown("<b> *x* [y]"))
        &lt;b&gt; \*x\* \[y\]
    """
    escaped = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKDOWN.sub(r"\\\1", escaped)
