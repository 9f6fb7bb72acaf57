"""Text of unknown origin (ids, paths, categories) as it is written, also on a terminal and in Markdown."""

import re
from unicodedata import category

from rich.text import Text

OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of control and format characters, halves of characters, and separators of lines and paragraphs."""

MARKDOWN = re.compile(r"([\\`*_\[\]])")


def visible(text: object, keep: str = "") -> str:
    r"""Return text with control and format characters as escapes, so that no terminal or page obeys them.

    Args:
        text: is made a string.
        keep: characters to leave as they are, such as line breaks.

    Example:
        >>> print(visible("red \x1b[31m, right to left \u202e, a line\n"))
        red \x1b[31m, right to left \u202e, a line\n
    """
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode()
        if category(character) in OBEYED and character not in keep
        else character
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
    escaped = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("~", "&#126;")
    return MARKDOWN.sub(r"\\\1", escaped)
