"""Docstrings for the documentation site: Sphinx roles and double backticks become Markdown code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?(?:[^`<]*<)?([\w.]+?)>?`")
_TITLED = re.compile(r":\w+:`([^`<]+?)\s*<[^`>]+>`")


class RolesToCode(griffe.Extension):
    """Runs for every object that the site shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """``:class:`~a.b.C``` as ```C```, and ````x```` as ```x```."""
    text = _TITLED.sub(r"`\1`", text)
    text = _ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    return text.replace("``", "`")
