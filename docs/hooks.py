"""Fills in the tables of results, and the settings, while the site is built."""

import dataclasses
import re
from typing import Any

from fishleg_ext.bench.studies.tables import TABLES
from fishleg_ext.config import PruneConfig


def settings() -> str:
    """Describe every field of PruneConfig."""
    lines = []
    for field in dataclasses.fields(PruneConfig):
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        kind = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", kind)
        lines.append(f"- **`{field.name}`** (`{kind}`, default `{field.default!r}`): {field.metadata['help']}")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace {{ NAME }} by the table of that name, or by the settings."""
    makers = TABLES | {"settings": settings}
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: makers[found[1]](), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Link to the settings where a docstring lists them at run time."""
    return html.replace("{settings}", 'All <a href="#settings">settings</a> are keywords.')
