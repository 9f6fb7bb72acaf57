"""Griffe extension: the sections of our docstrings under the names that Griffe knows.

`Example:` is shown as code, as Griffe does with `Examples:`. The `Args:` of a `TypedDict` are its keys, which Griffe
calls attributes.
"""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Rename the sections of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the sections of one object."""
        if obj.docstring is None:
            return
        obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        if isinstance(obj, griffe.Class) and any(str(base).endswith("TypedDict") for base in obj.bases):
            obj.docstring.value = re.sub(r"^Args:$", "Attributes:", obj.docstring.value, flags=re.MULTILINE)
