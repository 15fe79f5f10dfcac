"""How many operations pruning a weight saves: how often a forward pass uses it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fishleg_ext.observation.batches import chunks
from fishleg_ext.observation.forward import call, running

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def flops_per_weight(
    model: nn.Module, data: Iterable[Any], weights: Mapping[str, nn.Parameter], *, seed: int = 0
) -> dict[str, float]:
    """Multiplications by each weight of a parameter in a forward pass of one sample, the first of the data.

    A weight of a Linear layer is used once for each vector that the layer transforms, that of a convolution once for
    each position of its output (of its input, if it is transposed). Layers called several times, or that share the
    parameter, add up.

    Args:
        model: any module; put into eval mode while this runs.
        data: iterable of (inputs, targets) batches.
        weights: name -> parameter of the model.
        seed: of PyTorch's RNG.

    Raises:
        ValueError: no data, or a parameter that is the weight of no Linear or Conv layer that was called.

    Examples:
        >>> import torch
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> flops_per_weight(conv, [(torch.zeros(2, 3, 8, 8), torch.zeros(2))], {"weight": conv.weight})
        {'weight': 36.0}
    """
    names = {id(parameter): name for name, parameter in weights.items()}
    uses = dict.fromkeys(weights, 0.0)

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight = module.get_parameter("weight")
        x = inputs[0] if isinstance(module, TRANSPOSED) else output
        uses[names[id(weight)]] += x.numel() / len(weight)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, LAYERS) and id(m.weight) in names]
    device = next(iter(weights.values())).device
    try:
        with running(model, device, seed):
            for inputs, _, _ in chunks(data, 1, 1, device):
                call(model, {}, inputs)
                break
            else:
                raise ValueError("expected data that yields at least one sample, got none")
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [name for name, number in uses.items() if not number]:
        raise ValueError(
            f"expected weights of Linear and Conv layers that are called, {', '.join(unseen)} is none; see params="
        )
    return uses
