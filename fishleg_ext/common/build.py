"""Tells what was built when the package was installed, and loads its libraries."""

import json
from importlib import machinery, resources
from pathlib import Path
from typing import Any

import torch


def build_record() -> dict[str, dict[str, Any]]:
    """Read what was decided at install time: "cpu" and "cuda" -> {"built": bool, "reason": str}."""
    record = resources.files("fishleg_ext") / "build_record.json"
    if not record.is_file():
        unknown = {"built": False, "reason": "nothing is recorded of how this was installed"}
        return {"cpu": unknown, "cuda": unknown}
    return json.loads(record.read_text())


def load_ops(library: str, part: str, what: str) -> str | None:
    """Load a library of private ops.

    Args:
        library: name of the file, without what Python adds.
        part: "cpu" or "cuda".
        what: it is called in messages.

    Returns:
        why it is not here, or None if it is.
    """
    package = Path(str(resources.files("fishleg_ext")))
    found = next((p for s in machinery.EXTENSION_SUFFIXES if (p := package / f"{library}{s}").exists()), None)
    if found is None:
        return f"{what} not built: {build_record()[part]['reason']}"
    try:
        torch.ops.load_library(found)
    except OSError as error:
        return f"{what} not loaded: {error}"
    return None
