"""Which parameters of a model are pruned, and which of their dimensions are outputs."""

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.common.waiting import read_by_name

T = TypeVar("T")
ParameterChoice = str | Iterable[str] | Callable[[str, nn.Parameter], bool]
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def choose_parameters(model: nn.Module, params: ParameterChoice | None = None) -> dict[str, nn.Parameter]:
    """The parameters to prune, by name, in the model's order; tied ones once.

    Warns of layers that are left out since their weight is computed from other parameters.

    Args:
        model: any module.
        params: a name, a regular expression "re:..." that is searched for in names, a list of these, or a predicate
            (name, parameter) -> bool. None is the weight of every Linear and Conv layer, the projections of
            nn.MultiheadAttention, and in models of transformers Conv1D and the fused weights of experts.

    Raises:
        ValueError: nothing is chosen, a name matches nothing, or a weight holds NaN or inf.
        TypeError: a chosen parameter is not dense and floating point.

    Examples:
        >>> list(choose_parameters(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "re:^0"))
        ['0.weight', '0.bias']
    """
    named = dict(model.named_parameters())
    if params is None:
        weights = {id(weight) for module in model.modules() for _, weight in layer_weights(module)}
        adapters = adapters_of(model)
        chosen = {name: p for name, p in named.items() if id(p) in weights and p.numel() and name not in adapters}
        left_out = {name: why for name, module in model.named_modules() if (why := _why_left_out(name, module))}
        if adapters:
            left_out[""] = (
                f"{len(adapters)} parameters of adapters, such as {next(iter(adapters))}, which params can name"
            )
        if not chosen:
            found = "; ".join(left_out.values()) or ("empty ones alone" if weights else "none")
            raise ValueError(f"expected a model with Linear or Conv layers, or params= to name others; found {found}")
        if left_out:
            warnings.warn(f"these layers stay dense: {'; '.join(left_out.values())}", stacklevel=4)
    elif isinstance(params, nn.Module):
        raise TypeError(
            f"expected params to be names, 're:...' or a predicate, got the module {type(params).__name__}: give the "
            "names of its parameters"
        )
    elif callable(params):
        chosen = {name: p for name, p in named.items() if params(name, p)}
        if not chosen:
            raise ValueError(f"the predicate params chose none of the {len(named)} parameters")
    else:
        names = {name for pattern in _as_list(params) for name in _matches(model, named, pattern)}
        chosen = {name: p for name, p in named.items() if name in names}
        if not chosen:
            raise ValueError("expected params to name at least one parameter, got an empty list")
    check_weights(chosen)
    return chosen


def adapters_of(model: nn.Module) -> dict[str, str]:
    """Name -> the layer that it adapts, of the parameters of LoRA and other adapters that peft adds to layers."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        names = getattr(module, "adapter_layer_names", ())
        if not isinstance(getattr(module, "base_layer", None), nn.Module) or not isinstance(names, (tuple, list)):
            continue
        for held in names:
            part = getattr(module, held, None)
            inner = f"{path}.{held}" if path else held
            if isinstance(part, (nn.Module, nn.ParameterDict)):
                found |= {f"{inner}.{key}": path for key, _ in part.named_parameters()}
    return found


def layer_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a layer that are matrices its inputs are multiplied by, by the name of the attribute."""
    if isinstance(module, LAYERS) or _is_conv1d(module):
        names: tuple[str, ...] = ("weight",)
    elif isinstance(module, nn.MultiheadAttention):
        names = ATTENTION_WEIGHTS
    else:
        names = tuple(module._parameters) if _is_experts(module) else ()
    for name in names:
        weight = module._parameters.get(name)
        if weight is not None and (weight.dim() == 3 or not _is_experts(module)):
            yield name, weight


def orientations_of(
    model: nn.Module, weights: Mapping[str, nn.Parameter], *, channels_last: bool = False
) -> dict[str, Orientation]:
    """Name of a weight -> which of its dimensions are outputs, as its layer has them.

    Args:
        model: any module.
        weights: name -> parameter of the model.
        channels_last: whether the fan-in of a convolution goes over input channels last, for patterns along them.

    Examples:
        >>> layer = nn.ConvTranspose1d(4, 6, 3)
        >>> orientations_of(layer, {"weight": layer.weight})["weight"].matrix_shape
        (6, 4, 3)
    """
    found = {id(weight): Orientation.of(weight.shape) for weight in weights.values()}
    for module in model.modules():
        for _, weight in layer_weights(module):
            if id(weight) in found:
                found[id(weight)] = _orientation(module, weight, channels_last)
    return {name: found[id(weight)] for name, weight in weights.items()}


def _orientation(module: nn.Module, weight: nn.Parameter, channels_last: bool) -> Orientation:
    shape = tuple(weight.shape)
    if isinstance(module, TRANSPOSED):
        channels, outs, *kernel = shape
        positions = range(3, 3 + len(kernel))
        order = (0, 2, *positions, 1) if channels_last else (0, 2, 1, *positions)
        split = (module.groups, channels // module.groups, outs, *kernel)
        return Orientation.of(shape, order, split=split, num_out=2)
    if isinstance(module, nn.modules.conv._ConvNd):
        return Orientation.of(shape, (0, *range(2, len(shape)), 1) if channels_last else None)
    if _is_conv1d(module):
        return Orientation.of(shape, (1, 0))
    if _is_experts(module):
        return Orientation.of(shape, (0, 2, 1) if getattr(module, "is_transposed", False) else None, num_out=2)
    return Orientation.of(shape)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers, a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_experts(module: nn.Module) -> bool:
    """Whether it holds the weights of all experts in tensors [experts, ...], as those of transformers."""
    return type(module).__name__.endswith("Experts") and hasattr(module, "num_experts")


def _why_left_out(name: str, module: nn.Module) -> str:
    """Why a layer has no weight of its own that could be pruned; empty where it has one, or is none."""
    if not isinstance(module, LAYERS) or isinstance(module._parameters.get("weight"), nn.Parameter):
        return ""
    where = f"{name}." if name else ""
    originals = [f"{where}{key}" for key, _ in module.named_parameters() if key != "bias"]
    if any(key.endswith("weight_orig") for key in originals):
        return f"{where}weight is masked by torch.nn.utils.prune; torch.nn.utils.prune.remove makes it a parameter"
    if originals:
        return f"{where}weight is computed from {', '.join(originals)}, which params can name"
    return ""


def why_dense(model: nn.Module, chosen: Collection[str], *, by_default: bool) -> dict[str, str]:
    """Name -> why it is not pruned, of the parameters of two dimensions and more that are not chosen.

    Args:
        model: any module.
        chosen: names of those that are.
        by_default: whether `choose_parameters` chose them without being told.
    """
    reasons = {}
    adapters = adapters_of(model)
    computed = {where: why for where, module in model.named_modules() if (why := _why_left_out(where, module))}
    for name, parameter in model.named_parameters():
        if name in chosen or parameter.dim() < 2:
            continue
        owner = next((why for where, why in computed.items() if name.startswith(f"{where}.") or not where), "")
        default = "it is the weight of no Linear or Conv layer; params can name it"
        if name in adapters:
            default = f"it is of an adapter of {adapters[name]}; params can name it"
        reasons[name] = (owner or default) if by_default else "params does not name it"
    return reasons


def biases_of(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Map each weight to its layer's bias. Biases of several weights, or pruned themselves, are left out.

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
        if isinstance(module, LAYERS) or _is_conv1d(module) or isinstance(module, nn.MultiheadAttention):
            for name, weight in layer_weights(module):
                if id(weight) in pruned:
                    bias = module._parameters.get(name.removesuffix("weight") + "bias")
                    known = bias is not None and id(bias) in names and id(bias) not in pruned
                    found.append((names[id(weight)], names[id(bias)] if known else ""))
    # Not where layers that share the weight have other biases or none, nor where others share the bias.
    pairs = dict.fromkeys(found)
    layers = Counter(name for pair in pairs for name in pair)
    return {weight: bias for weight, bias in pairs if bias and layers[weight] == layers[bias] == 1}


def own_names(model: nn.Module, values: Mapping[str, T]) -> dict[str, T]:
    """Replace other names of tied parameters by those that `named_parameters` has.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> net[1].weight = net[0].weight
        >>> own_names(net, {"1.weight": 0.5})
        {'0.weight': 0.5}
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases = dict(model.named_parameters(remove_duplicate=False))
    return {names[id(aliases[key])] if key in aliases else key: value for key, value in values.items()}


def check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise unless all weights are dense, real, floating point and finite."""
    for name, weight in weights.items():
        _check_kind(name, weight)
    finite = read_by_name({name: weight.isfinite().all() for name, weight in weights.items()})
    if bad := [name for name, yes in finite.items() if not yes]:
        raise ValueError(f"{bad[0]} contains NaN or inf")


def _check_kind(name: str, weight: torch.Tensor) -> None:
    if weight.layout is not torch.strided:
        raise TypeError(f"expected {name} to be a dense (strided) tensor, got {weight.layout}")
    if not weight.is_floating_point():
        raise TypeError(f"expected {name} of a floating-point dtype, got {weight.dtype}")
    if weight.is_meta:
        raise TypeError(f"expected {name} to hold values, got a tensor on the meta device")
    if not weight.numel():
        raise ValueError(f"expected {name} to hold weights, got a tensor of shape {list(weight.shape)}")


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
