"""One kind of progress bar for everything that takes long: on standard error, and only where that is a terminal."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def progress_bar(items: Iterable[T] | None = None, *, what: str, show: bool, total: int | None = None) -> "tqdm[T]":
    """A bar over `items`, or one that is moved by hand towards `total`; removed once it is full."""
    return tqdm(items, desc=what, total=total, leave=False, disable=None if show else True)
