"""Text of unknown origin (ids, categories, tokens) as it is written, and HTML for notebooks."""

import html
from dataclasses import dataclass, field
from unicodedata import category

OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of control and format characters, halves of characters, and separators of lines and paragraphs."""

MOST_CHARACTERS = 4000


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


def escaped(text: object, most: int = MOST_CHARACTERS, keep: str = "") -> str:
    r"""Return text for HTML, between tags or in an attribute, as it is written.

    Args:
        text: is made a string.
        most: number of its characters to show.
        keep: control characters to leave as they are, such as line breaks.

    Example:
        >>> escaped("<b>\u202e and more", most=8)
        '&lt;b&gt;\\u202e and… (13 characters)'
    """
    whole = str(text)
    cut = f"… ({len(whole)} characters)" if len(whole) > most else ""
    return html.escape(visible(whole[:most], keep)) + cut


@dataclass(frozen=True)
class Html:
    """HTML that a notebook shows, as the last value of a cell.

    Args:
        markup: with text of unknown origin escaped.

    Example:
        >>> Html(f"<b>{escaped('x < y')}</b>").markup
        '<b>x &lt; y</b>'
    """

    markup: str = field(repr=False)  # a console shows the name alone

    def _repr_html_(self) -> str:
        return self.markup
