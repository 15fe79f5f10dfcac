"""Runs a model without changing it."""

import contextlib
import contextvars
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fishleg_ext.observation.likelihoods import LossFunction

_running = contextvars.ContextVar("running", default=False)


def is_running() -> bool:
    """Tell whether a model runs within `running` here, so that its passes are the library's and not the user's."""
    return _running.get()


@contextlib.contextmanager
def running(model: nn.Module, device: torch.device, seed: int, *, restore_buffers: bool = True) -> Iterator[None]:
    """The model in eval mode and PyTorch's RNG seeded; both, and the buffers, as they were afterwards.

    What was compiled runs uncompiled meanwhile. Within, `training` puts modules into training mode.
    """
    training = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.no_grad())
        if restore_buffers:
            stack.enter_context(_restoring_buffers(model))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed devices that are not forked too
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        model.eval()
        token = _running.set(True)
        try:
            yield
        finally:
            _running.reset(token)
            for module, flag in training.items():
                module.training = flag


@contextlib.contextmanager
def training(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules in training mode within this block, and in eval mode afterwards."""
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


@contextlib.contextmanager
def _restoring_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what forward passes write into buffers, in place or by assignment, and into embeddings with max_norm."""
    before: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (held, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for held in (module._buffers, module._parameters if getattr(module, "max_norm", None) is not None else {})
        for name, tensor in held.items()
        if tensor is not None and not tensor.is_inference()
    ]
    try:
        yield
    finally:
        for held, name, tensor, values in before:
            # Some are written without a new version, as statistics of norms are; and this is no new one.
            tensor.data.copy_(values)
            if held.get(name) is not tensor:
                held[name] = tensor


def call(model: nn.Module, weights: Mapping[str, Tensor], inputs: Any) -> Any:
    """The model's outputs with some parameters replaced: a tuple is positional, a dict keywords.

    The model gets copies of the inputs' tensors, which it may change in place.
    """
    inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    return functional_call(model, _by_places(model, weights), args, kwargs, tie_weights=False)


def _by_places(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name each place where a parameter or buffer is held once, for all that are tied to those given.

    PyTorch's own `tie_weights` swaps a module that is registered under two names twice, and then leaves what it was
    given in the place of the parameter.
    """
    held: dict[int, dict[tuple[int, str], str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                held.setdefault(id(tensor), {}).setdefault((id(module), name), f"{path}.{name}" if path else name)
    by_name = {name: places for places in held.values() for name in places.values()}
    return {place: tensor for name, tensor in weights.items() for place in by_name.get(name, {0: name}).values()}


def scalar_loss(loss_fn: LossFunction | None, outputs: Any, targets: Any) -> Tensor:
    """The loss, or an error if it is not one number; without a loss function the one that the model returns."""
    if loss_fn is None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            raise ValueError(
                "expected a model whose outputs have a loss, with loss_fn=None, got "
                f"{type(outputs).__name__}{'' if loss is None else f' with a {type(loss).__name__} as loss'}; are the "
                "labels among the inputs?"
            )
    else:
        loss = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected loss_fn to return a scalar tensor, got a {type(loss).__name__}")
    if loss.dim():
        raise ValueError(f"expected loss_fn to return a scalar, got a tensor of shape {list(loss.shape)}")
    return loss
