"""Registers every op with PyTorch and decides which implementation of it runs.

An op is one Python function that checks its arguments, decorated with `op`. The decorator derives the schema from the
signature, registers `torch.ops.fishleg_ext.NAME` under it, and returns the public function. The checks run on
metadata alone, so that they guard real calls and traced ones (fake tensors) alike.

The op is registered for CompositeExplicitAutograd and chooses the implementation at run time: `impl=` and `use_impl`
therefore mean the same inside and outside `torch.compile`. The autograd key falls through: results never require grad.
"""

import contextvars
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

IMPLS = ("auto", "reference", "triton", "cuda")

_LIBRARY = torch.library.Library("fishleg_ext", "DEF")
_preferred_impl = contextvars.ContextVar("fishleg_ext_impl", default="auto")


@dataclass(frozen=True)
class Op:
    """One registered op: its schema and the implementations of it."""

    name: str
    schema: str
    reference: Callable[..., Any]

    def unavailable(self, impl: str) -> str | None:
        """Why `impl` cannot run this op here, or None if it can."""
        if impl in ("auto", "reference"):
            return None
        language = {"triton": "Triton", "cuda": "CUDA C++"}[impl]
        return f"there is no {language} kernel for it yet"

    def resolve(self, impl: str) -> Callable[..., Any]:
        """The function that runs for `impl`; what "auto" means is decided by `use_impl`, if it is in force."""
        check_impl(impl)
        chosen = _preferred_impl.get() if impl == "auto" else impl
        reason = self.unavailable(chosen)
        if reason is not None:
            raise NotImplementedError(f"{self.name}: impl={chosen!r} was requested, but {reason}")
        return self.reference


OPS: dict[str, Op] = {}


def op(
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make an op of a function that checks arguments.

    Args:
        reference: the specification, in eager PyTorch; the checked function's signature without `impl`.
        fake: the same signature; allocates outputs of the right shape and dtype. None where nothing is returned.
        mutates: names of the arguments that are written in place.
    """

    def decorate(check: Callable[P, R]) -> Callable[P, R]:
        name = check.__name__
        entry = Op(name, name + torch.library.infer_schema(check, mutates_args=mutates), reference)

        def run(*args: Any, impl: str = "auto", **kwargs: Any) -> Any:
            with torch.no_grad():
                check(*args, **kwargs)
                return entry.resolve(impl)(*args, **kwargs)

        def trace(*args: Any, impl: str = "auto", **kwargs: Any) -> Any:
            check(*args, **kwargs)
            check_impl(impl)
            return fake(*args, **kwargs) if fake else None

        _LIBRARY.define(entry.schema)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"fishleg_ext::{name}", trace, lib=_LIBRARY)
        OPS[name] = entry
        overload = getattr(torch.ops.fishleg_ext, name).default

        @functools.wraps(check)
        def public(*args: P.args, **kwargs: P.kwargs) -> R:
            return overload(*args, **kwargs)

        return public

    return decorate


class use_impl:
    """Run every op called in this block with `impl`, unless the call itself names another.

    Put it around a compiled function, not into it.

    Args:
        impl: "auto", "reference", "triton" or "cuda".

    Raises:
        ValueError: `impl` is none of these.

    >>> with use_impl("reference"):
    ...     score = torch.ops.fishleg_ext.obs_score(torch.ones(2), torch.ones(2))
    """

    def __init__(self, impl: str) -> None:
        check_impl(impl)
        self.impl = impl
        self._tokens: list[contextvars.Token[str]] = []

    def __enter__(self) -> None:
        self._tokens.append(_preferred_impl.set(self.impl))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _preferred_impl.reset(self._tokens.pop())


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` names an implementation."""
    if impl not in IMPLS:
        raise ValueError(f"expected impl to be one of {', '.join(IMPLS)}, got {impl!r}")
