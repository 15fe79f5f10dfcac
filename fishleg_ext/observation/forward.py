"""Runs a model without changing it."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fishleg_ext.observation.likelihoods import LossFunction


@contextlib.contextmanager
def running(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """The model in eval mode and PyTorch's RNG seeded; both as they were afterwards."""
    training = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed devices that are not forked too
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, flag in training.items():
                module.training = flag


def call(model: nn.Module, weights: Mapping[str, Tensor], inputs: Any) -> Any:
    """The model's outputs with some parameters replaced: a tuple is positional, a dict keywords."""
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    return functional_call(model, dict(weights), args, kwargs)


def scalar_loss(loss_fn: LossFunction, outputs: Any, targets: Any) -> Tensor:
    """The loss, or ValueError if it is not one number."""
    loss = loss_fn(outputs, targets)
    if loss.dim():
        raise ValueError(f"expected loss_fn to return a scalar, got a tensor of shape {list(loss.shape)}")
    return loss
