"""Settings: frozen dataclasses, compared by value, whose fields say how they are checked."""

import dataclasses
from collections.abc import Callable
from typing import Any


def setting(default: Any, check: Callable[[str, Any], Any] | None = None, help: str = "", **more: Any) -> Any:
    """Make a field of `Settings`.

    Args:
        default: its value where none is given; where it is None, None is not checked.
        check: (name, value) -> the value in its plain type; raises ValueError or TypeError.
        help: one sentence, for docs and the command line.
        more: further entries of the field's metadata, and `compare`, as of `dataclasses.field`.
    """
    compare = more.pop("compare", True)
    return dataclasses.field(default=default, compare=compare, metadata={"check": check, "help": help, **more})


class FrozenDict(dict[Any, Any]):
    """A dict that cannot be changed, and that can be hashed where its values can."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type, tuple[dict[Any, Any]]]:
        return FrozenDict, (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("these settings are frozen; make new ones, by dataclasses.replace for instance")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse


class Settings:
    """Base class of frozen dataclasses whose fields are made by `setting`."""

    def __post_init__(self) -> None:
        """Check every field, and keep it in its plain type."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, check = getattr(self, field.name), field.metadata.get("check")
            if check is not None and not (value is None and field.default is None):
                object.__setattr__(self, field.name, check(field.name, value))
