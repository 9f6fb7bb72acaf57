"""Griffe extension: our docstrings in the form that Griffe and Markdown know.

- `Example:` is shown as code, as Griffe does with `Examples:`.
- The `Args:` of a `TypedDict` are its keys, which Griffe calls attributes.
- Two indices, as in post[l][t], are not a link.
"""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Rewrite every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is None:
            return
        lines = [_without_links(line) for line in obj.docstring.value.split("\n")]
        text = re.sub(r"^( *)Example:$", r"\1Examples:", "\n".join(lines), flags=re.MULTILINE)
        if isinstance(obj, griffe.Class) and any(str(base).endswith("TypedDict") for base in obj.bases):
            text = re.sub(r"^Args:$", "Attributes:", text, flags=re.MULTILINE)
        obj.docstring.value = text


def _without_links(line: str) -> str:
    is_code = "`" in line or line.startswith("    ")
    return line if is_code else line.replace("][", "]\\[")
