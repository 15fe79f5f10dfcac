"""Fills in the tables of results while the site is built."""

import re
from typing import Any

from fishleg_ext.bench.studies.tables import TABLES


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace {{ NAME }} by the table of that name."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: TABLES[found[1]](), markdown)
