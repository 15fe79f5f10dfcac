"""One kind of progress bar for everything that takes long: in a notebook, or where standard error is a terminal."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import auto
from tqdm.auto import tqdm

T = TypeVar("T")


def progress_bar(items: Iterable[T] | None = None, *, what: str, show: bool, total: int | None = None) -> "tqdm[T]":
    """A bar over `items`, or one that is moved by hand towards `total`; removed once it is full."""
    in_notebook = auto.notebook_tqdm is not auto.std_tqdm  # whose bars need no terminal, which None asks for
    return tqdm(items, desc=what, total=total, leave=False, disable=(False if in_notebook else None) if show else True)
