"""Hooks of the documentation site (see mkdocs.yml)."""

import re
from pathlib import Path
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """Turn links to files outside docs/ into plain text, after checking that the files exist."""

    def plain(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = (Path(page.file.abs_src_path).parent / target.partition("#")[0]).resolve()
        docs = Path(config["docs_dir"]).resolve()
        if path.is_relative_to(docs):
            return match[0]
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_path} links to {target}, which does not exist")
        return f"{text} (`{path.relative_to(docs.parent)}`)"

    return _OUTSIDE.sub(plain, markdown)
