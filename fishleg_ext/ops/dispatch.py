"""Registers every op with PyTorch and decides which implementation of it runs.

An op is one Python function that checks its arguments, decorated with `op`. The decorator derives the schema from the
signature, registers `torch.ops.fishleg_ext.NAME` under it, and returns the public function. The checks run on
metadata alone, so that they guard real calls and traced ones (fake tensors) alike.

The op is registered for CompositeExplicitAutograd and chooses the implementation at run time: `impl=` and `use_impl`
therefore mean the same inside and outside `torch.compile`. The autograd key falls through: results never require grad.

A kernel of op `S` in family `F` is a launcher `S` in `fishleg_ext/kernels/F.py` (Triton), `fishleg_ext/cuda/F.py`
(CUDA C++) or `fishleg_ext/cpu/F.py` (C++ for CPUs; batched PyTorch where that is not built or, for some ops,
where no GPU kernel takes the arguments), which takes the op's arguments, and beside it `supports_S`, which takes them
too and returns whether the kernel takes them and, if not, why not. No module is imported before its kernel is wanted.
"""

import contextvars
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

from fishleg_ext.common.dtypes import ieee_products

P = ParamSpec("P")
R = TypeVar("R")

IMPLS = ("auto", "reference", "triton", "cuda", "cpu")

_LIBRARY = torch.library.Library("fishleg_ext", "DEF")
_preferred_impl = contextvars.ContextVar("fishleg_ext_impl", default="auto")


@dataclass(frozen=True)
class Op:
    """One registered op: its schema and the implementations of it."""

    name: str
    family: str
    schema: str
    reference: Callable[..., Any]
    mutates: tuple[str, ...]  # arguments written in place
    kernels: tuple[str, ...]  # implementations beside the reference, the fastest first

    def unavailable(self, impl: str) -> str | None:
        """Why `impl` cannot run this op here, whatever the arguments, or None if it can."""
        if self._is_reference(impl):
            return None
        if impl not in self.kernels:
            return f"there is no {_LANGUAGE[impl]} kernel for it yet"
        try:
            return _backend(impl).unavailable()
        except ImportError as error:
            return f"{_LANGUAGE[impl]} is not installed ({error})"

    def launcher(self, impl: str) -> Callable[..., Any]:
        """The function that runs kernel `impl`, which must be available."""
        if self._is_reference(impl):
            return self.reference
        return getattr(self.module(impl), self.name)

    def supports(self, impl: str, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """Tell whether `impl` takes these arguments here, and if not, why not."""
        reason = self.unavailable(impl)
        if reason is not None:
            return False, reason
        if self._is_reference(impl):
            return True, ""
        return getattr(self.module(impl), f"supports_{self.name}")(*args, **kwargs)

    def resolve(self, impl: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The function that runs for `impl` and these arguments; `use_impl`, if in force, says what "auto" means."""
        check_impl(impl)
        chosen = _preferred_impl.get() if impl == "auto" else impl
        if chosen == "auto":
            here = (kernel for kernel in self.kernels if kernel == "cpu" or _on_gpu(args))
            chosen = next((kernel for kernel in here if self.supports(kernel, *args, **kwargs)[0]), "reference")
        elif chosen != "reference":
            supported, reason = self.supports(chosen, *args, **kwargs)
            if not supported:
                raise NotImplementedError(f"{self.name}: impl={chosen!r} was requested, but {reason}")
        return self.launcher(chosen)

    def _is_reference(self, impl: str) -> bool:
        """Tell whether the reference runs: on a CPU it is the fastest for most ops."""
        return impl in ("auto", "reference") or (impl == "cpu" and "cpu" not in self.kernels)

    def module(self, impl: str) -> ModuleType:
        """The module of the launchers of this op's family."""
        return importlib.import_module(f"{_BACKENDS[impl]}.{self.family}")


_BACKENDS = {"triton": "fishleg_ext.kernels", "cuda": "fishleg_ext.cuda", "cpu": "fishleg_ext.cpu"}
_LANGUAGE = {"triton": "Triton", "cuda": "CUDA C++", "cpu": "CPU"}


def _backend(impl: str) -> ModuleType:
    return importlib.import_module(_BACKENDS[impl])


def _on_gpu(args: tuple[Any, ...]) -> bool:
    """Tell whether the first argument, or the first of it, is on a GPU: nowhere else is a kernel faster."""
    first = args[0] if args else None
    if isinstance(first, (list, tuple)):
        first = first[0] if first else None
    return isinstance(first, torch.Tensor) and first.is_cuda


OPS: dict[str, Op] = {}


def op(
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    mutates: tuple[str, ...] = (),
    kernels: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make an op of a function that checks arguments.

    Args:
        reference: the specification, in eager PyTorch; the checked function's signature without `impl`.
        fake: the same signature; allocates outputs of the right shape and dtype. None where nothing is returned.
        mutates: names of the arguments that are written in place.
        kernels: "triton", "cuda" or both: the kernels there are, the fastest first.
    """

    def decorate(check: Callable[P, R]) -> Callable[P, R]:
        name = check.__name__
        if (inspect.signature(check).return_annotation is None) != (fake is None):
            raise TypeError(f"{name}: expected a fake exactly where something is returned")
        schema = name + torch.library.infer_schema(check, mutates_args=mutates)
        entry = Op(name, check.__module__.rpartition(".")[2], schema, reference, mutates, kernels)

        def run(*args: Any, impl: str = "auto", **kwargs: Any) -> Any:
            with torch.no_grad(), ieee_products():
                check(*args, **kwargs)
                return entry.resolve(impl, *args, **kwargs)(*args, **kwargs)

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

    Examples:
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
