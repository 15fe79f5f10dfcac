"""Which parameters of a model are pruned."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

ParameterChoice = str | Iterable[str] | Callable[[str, nn.Parameter], bool]


def choose_parameters(model: nn.Module, params: ParameterChoice | None = None) -> dict[str, nn.Parameter]:
    """The parameters to prune, by name, in the model's order; tied ones once.

    Args:
        model: any module.
        params: a name, a regular expression "re:..." that is searched for in names, a list of these, or a predicate
            (name, parameter) -> bool. None is the weight of every Linear and Conv layer.

    Raises:
        ValueError: nothing is chosen, a name matches nothing, or a weight holds NaN or inf.
        TypeError: a chosen parameter is not dense and floating point.

    Examples:
        >>> list(choose_parameters(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "re:^0"))
        ['0.weight', '0.bias']
    """
    named = dict(model.named_parameters())
    if params is None:
        layers = (nn.Linear, nn.modules.conv._ConvNd)
        weights = {id(m._parameters.get("weight")) for m in model.modules() if isinstance(m, layers)}
        chosen = {name: p for name, p in named.items() if id(p) in weights}
        if not chosen:
            raise ValueError("expected a model with Linear or Conv layers, or params= to name others; found none")
    elif callable(params):
        chosen = {name: p for name, p in named.items() if params(name, p)}
        if not chosen:
            raise ValueError(f"the predicate params chose none of the {len(named)} parameters")
    else:
        names = {name for pattern in _as_list(params) for name in _matches(model, named, pattern)}
        chosen = {name: p for name, p in named.items() if name in names}
        if not chosen:
            raise ValueError("expected params to name at least one parameter, got an empty list")
    for name, parameter in chosen.items():
        check_weight(name, parameter)
    return chosen


def biases_of(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Map each weight to its layer's bias. Biases shared by layers, or pruned themselves, are left out.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        >>> biases_of(net, dict(net.named_parameters()))
        {}
        >>> biases_of(net, {"0.weight": net[0].weight})
        {'0.weight': '0.bias'}
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pruned, found = {id(parameter) for parameter in weights.values()}, list[tuple[str, str]]()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and id(module.weight) in pruned:
            bias = module.bias
            known = bias is not None and id(bias) in names and id(bias) not in pruned
            found.append((names[id(module.weight)], names[id(bias)] if known else ""))
    # Not where layers share the weight or the bias, and not where some of these have none.
    layers = Counter(name for pair in found for name in pair)
    return {weight: bias for weight, bias in found if bias and layers[weight] == layers[bias] == 1}


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Raise unless the weight is dense, real, floating point and finite."""
    if weight.layout is not torch.strided:
        raise TypeError(f"expected {name} to be a dense (strided) tensor, got {weight.layout}")
    if not weight.is_floating_point():
        raise TypeError(f"expected {name} of a floating-point dtype, got {weight.dtype}")
    if weight.is_meta:
        raise TypeError(f"expected {name} to hold values, got a tensor on the meta device")
    if not weight.isfinite().all():
        raise ValueError(f"{name} contains NaN or inf")


def _as_list(params: str | Iterable[str]) -> list[str]:
    return [params] if isinstance(params, str) else list(params)


def _matches(model: nn.Module, named: dict[str, nn.Parameter], pattern: str) -> list[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"expected params to hold names, got {type(pattern).__name__}")
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"params {pattern!r} is not a regular expression: {error}") from error
        found = [name for name in named if expression.search(name)]
    elif pattern in named:
        found = [pattern]
    else:  # another name of a tied parameter
        aliases = dict(model.named_parameters(remove_duplicate=False))
        found = [name for name, p in named.items() if pattern in aliases and p is aliases[pattern]]
    if not found:
        inside = sorted((name for name in named if pattern in name), key=lambda name: not name.endswith("weight"))
        close = inside[:3] or difflib.get_close_matches(pattern, named, n=3)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else f"there are {', '.join([*named][:8])}{', ...' * (len(named) > 8)}"
        )
        raise ValueError(f"no parameter matches {pattern!r}; {hint}")
    return found
