"""Files that are written whole or not at all, and safetensors."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside `path` and put it in its place once it is on the disk."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not everywhere can a folder be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def require_safetensors() -> Any:
    """The package, or ImportError that says how to install it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"safetensors files need a package: pip install safetensors ({error})") from error
    return safetensors


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file by name, and its metadata; ValueError where it is none."""
    package = require_safetensors()
    try:
        with package.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except package.SafetensorError as error:
        raise ValueError(f"{path} is truncated, or no safetensors file: {error}") from error
