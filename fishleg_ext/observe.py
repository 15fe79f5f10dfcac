"""Runs a model over data and hands a curvature model what it observes, a chunk at a time.

The model runs in eval mode, so that BatchNorm uses its running statistics and dropout is off. Nothing of the model is
changed: parameters are replaced functionally, training flags and PyTorch's RNG are put back.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol, Union

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils import _pytree as pytree

from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.labels import Likelihood, LossFunction, LossHessian, label_sampler, loss_hessian

# Memory for gradients, or for unfolded layer inputs, beside the activations of at most CHUNK_SAMPLES samples.
# Vectorised gradients take COPIES times their own size while they are computed. One is computed in any case.
CHUNK_BYTES = 2**28
CHUNK_SAMPLES = 64
COPIES = 3
BATCHNORM_SAMPLES = 128

# v by parameter name -> F v.
FisherProduct = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
# (outputs, samples, count) -> targets and what to scale gradients by, as of `LabelSampler.draw`.
DrawLabels = Callable[[Any, int, int], tuple[Any, Union[float, Tensor]]]


@dataclass(frozen=True)
class Observation:
    """One chunk of what a curvature model observes; parameters go by name.

    Attributes:
        count: gradients or samples in this chunk.
        gradients: name -> [count, *shape], zero where a mask is False.
        inputs: name -> [rows, fan_in], what the layer's weight is multiplied by: a row for each sample and position.
            A convolution with g groups has [g, rows, fan_in]. The layers come one at a time.
        output_gradients: name -> [rows, fan_out], of each sample's loss by the layer's outputs, a row for each sample
            and position. The layers come one at a time.
        fisher_product: multiplies by the whole network's Fisher matrix, the mean over the samples of this chunk without
            sampled labels: the generalised Gauss-Newton matrix.
    """

    count: int
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    output_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    fisher_product: Optional[FisherProduct] = None


class Observer(Protocol):
    """What `observe` asks of a curvature model."""

    @property
    def observes(self) -> frozenset[str]:
        """Either "gradients", perhaps with "fisher_products", or any of "inputs" and "output_gradients"."""

    def update(self, observation: Observation) -> None:
        """Take in one chunk."""


def observe(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction,
    observer: Observer,
    weights: Mapping[str, nn.Parameter],
    *,
    masks: Optional[Mapping[str, Tensor]] = None,
    num_grads: int = 1024,
    grad_batch_size: int = 1,
    labels: str = "data",
    likelihood: Optional[Likelihood] = None,
    seed: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
    progress: bool = False,
) -> int:
    """Feed a curvature model with gradients or layer inputs of the given weights.

    Args:
        model: any module; put into eval mode while this runs.
        data: iterable of (inputs, targets) batches; inputs a tensor, a tuple (positional) or a dict (keywords).
        loss_fn: (outputs, targets) -> scalar, the mean over the batch.
        observer: its `observes` says what is computed; its `update` gets it.
        weights: name -> parameter of the model.
        masks: name -> bool tensor, True = kept; gradients of the pruned are zero.
        num_grads: gradients in all; for layer inputs, num_grads * grad_batch_size samples.
        grad_batch_size: samples whose mean loss one gradient is of.
        labels: "data", or "model": targets sampled from the model's own likelihood (true Fisher).
        likelihood: for labels="model"; "categorical", "gaussian", "bernoulli" or (outputs, generator) -> targets.
            May be None with cross_entropy.
        seed: of the sampled labels, and of PyTorch's RNG while the data is read.
        chunk_bytes: memory for gradients or for unfolded inputs at a time.
        progress: show a progress bar.

    Returns:
        how many gradients were used. If the data ends early, a warning says so.

    Raises:
        ValueError: no data; gradients with NaN or inf, by parameter; labels="model" without a likelihood.
        TypeError: data that does not yield pairs of batches of tensors.
    """
    wanted = observer.observes
    known = [{"gradients"}, {"gradients", "fisher_products"}, {"inputs"}, {"output_gradients"}]
    if wanted not in [*known, {"inputs", "output_gradients"}]:
        raise ValueError(
            "expected a curvature model to observe gradients and perhaps fisher_products, or inputs and "
            f"output_gradients, got {', '.join(sorted(wanted)) or 'nothing'}"
        )
    hessian = loss_hessian(loss_fn, likelihood) if "fisher_products" in wanted else None
    device = next(iter(weights.values())).device
    needs_labels = wanted != {"inputs"}
    sampler = label_sampler(labels, loss_fn, likelihood) if needs_labels else None
    generator = torch.Generator(device).manual_seed(seed)
    draw: Optional[DrawLabels] = None if sampler is None else functools.partial(sampler.draw, generator)
    source: Optional[_GradientSource] = None
    with (
        running(model, device, seed),
        progress_bar(what="gradients", total=num_grads, show=progress) as bar,
    ):
        if "gradients" in wanted:
            source = _GradientSource(model, loss_fn, weights, masks or {}, draw)
            per_gradient = gradient_bytes(weights.values())
            chunk = max(1, min(chunk_bytes // max(1, per_gradient), CHUNK_SAMPLES // grad_batch_size))
            limit = num_grads * grad_batch_size
            used = 0
            for inputs, targets, samples in chunks(data, chunk * grad_batch_size, limit, device):
                count = samples // grad_batch_size
                if count:
                    samples = count * grad_batch_size  # a gradient of the few left over would count as much
                elif not used:
                    count = 1  # fewer samples in all than one gradient is to have
                if count:
                    gradients = source.gradients(inputs, targets, samples, count)
                    product = source.fisher_product(inputs, samples, hessian) if hessian else None
                    observer.update(Observation(count, gradients=gradients, fisher_product=product))
                    del gradients  # before the next chunk's are computed
                used += count
                bar.update(count)
        else:
            bar.set_description("layers")
            layers = _LayerSource(model, loss_fn, weights, observer, draw, chunk_bytes)
            used = 0
            with layers.hooked():
                for inputs, targets, samples in chunks(data, CHUNK_SAMPLES, num_grads * grad_batch_size, device):
                    layers.run(inputs, targets, samples)
                    used += samples
                    bar.update(samples)
            used = -(-used // grad_batch_size)
    if used == 0:
        raise ValueError("expected data that yields at least one sample, got none")
    if source is not None and not source.any_nonzero:
        warnings.warn("every gradient is zero: does the loss fit the model's outputs?", stacklevel=2)
    if used < num_grads:
        warnings.warn(
            f"the data ended after {used} of num_grads={num_grads} gradients; these are used",
            stacklevel=2,
        )
    return used


def gradient_bytes(weights: Iterable[Tensor]) -> int:
    """Memory that one gradient of these weights takes while it is computed among others."""
    return COPIES * sum(weight.numel() * weight.element_size() for weight in weights)


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


def chunks(data: Iterable[Any], size: int, limit: int, device: torch.device) -> Iterator[tuple[Any, Any, int]]:
    """Re-cut batches into chunks of exactly `size` samples, the last one smaller, `limit` samples in all.

    Yields:
        inputs, targets and their number of samples; tensors on `device`.
    """
    held: list[Tensor] = []
    spec = None
    remaining = limit
    if remaining <= 0:
        return
    for batch in data:
        leaves, batch_spec = pytree.tree_flatten(_pair(batch))
        count = _batch_size(leaves)
        if spec is not None and batch_spec != spec:
            raise TypeError(f"expected every batch of the structure of the first, {spec}, got {batch_spec}")
        spec = batch_spec
        leaves = [leaf[:remaining].to(device) for leaf in leaves]
        remaining -= min(count, remaining)
        held = [torch.cat(pair) for pair in zip(held, leaves, strict=True)] if held else leaves
        while len(held[0]) >= size:
            yield *pytree.tree_unflatten([leaf[:size] for leaf in held], spec), size
            held = [leaf[size:] for leaf in held]
        if remaining == 0:
            break
    if held and len(held[0]):
        assert spec is not None
        yield *pytree.tree_unflatten(held, spec), len(held[0])


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"expected data to yield (inputs, targets) pairs, got {type(batch).__name__}")
    return batch[0], batch[1]


def _batch_size(leaves: Sequence[Any]) -> int:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            raise TypeError(
                "expected batches of tensors whose first dimension is the sample, got a "
                f"{'tensor without dimensions' if isinstance(leaf, Tensor) else type(leaf).__name__}; "
                "a dataset of single samples goes through torch.utils.data.DataLoader"
            )
    sizes = sorted({len(leaf) for leaf in leaves})
    if len(sizes) != 1:
        raise ValueError(f"expected inputs and targets with as many samples each, got {sizes}")
    return sizes[0]


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


class _GradientSource:
    """Gradients of the mean loss over groups of samples, by vmap where the model allows it."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        weights: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        draw: Optional[DrawLabels],
    ) -> None:
        self.model, self.loss_fn, self.masks, self.draw = model, loss_fn, masks, draw
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.vectorized: Optional[bool] = None
        self.any_nonzero = False

    def gradients(self, inputs: Any, targets: Any, samples: int, count: int) -> dict[str, Tensor]:
        """`count` gradients, each of as many of the samples; name -> [count, *shape]."""
        inputs = pytree.tree_map(lambda x: x[:samples], inputs)
        targets = pytree.tree_map(lambda x: x[:samples], targets)
        scale: Union[float, Tensor] = 1.0
        if self.draw is not None:
            targets, scale = self.draw(call(self.model, self.weights, inputs), samples, count)
        group = lambda x: x.unflatten(0, (count, -1))
        values = self._compute(pytree.tree_map(group, inputs), pytree.tree_map(group, targets), count)
        return self._masked(values, scale)

    def fisher_product(self, inputs: Any, samples: int, hessian: LossHessian) -> FisherProduct:
        """J^T H J v, J the outputs' derivative by the weights and H the loss's second one by the outputs."""
        inputs = pytree.tree_map(lambda x: x[:samples], inputs)
        function = lambda weights: call(self.model, weights, inputs)

        def multiply(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
            tangents = {name: v.get(name, torch.zeros_like(x)).to(x.dtype) for name, x in self.weights.items()}
            outputs, tangent = jvp(function, (self.weights,), (tangents,))[:2]
            return vjp(function, self.weights)[1](hessian(outputs, tangent))[0]

        return multiply

    def _compute(self, inputs: Any, targets: Any, count: int) -> dict[str, Tensor]:
        """Gradients of inputs and targets [count, group, ...]."""
        if self.vectorized is False:
            return self._loop(inputs, targets, count)
        try:
            vmapped = vmap(grad(self._loss), in_dims=(None, 0, 0), randomness="different")
            values = vmapped(self.weights, inputs, targets)
        except Exception as error:
            if self.vectorized:  # it worked before, so this is not about vmap
                raise
            values = self._loop(inputs, targets, count)  # raises what is wrong with the model or the data itself
            self.vectorized = False
            reason = str(error).strip().splitlines()
            warnings.warn(
                "torch.func.vmap cannot run this model, so gradients are computed one by one, which is slower: "
                f"{reason[0] if reason else type(error).__name__}",
                stacklevel=2,
            )
        else:
            self.vectorized = True
        return values

    def _loss(self, values: dict[str, Tensor], inputs: Any, targets: Any) -> Tensor:
        return scalar_loss(self.loss_fn, call(self.model, values, inputs), targets)

    def _loop(self, inputs: Any, targets: Any, count: int) -> dict[str, Tensor]:
        """The same by plain autograd, for models that torch.func cannot run."""
        weights = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        result = {name: weight.new_empty((count, *weight.shape)) for name, weight in self.weights.items()}
        for i in range(count):
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}  # may be written to
            with torch.enable_grad():
                one = pytree.tree_map(lambda x, i=i: x[i], (inputs, targets))
                loss = self._loss(weights | buffers, *one)
            for name, gradient in zip(result, torch.autograd.grad(loss, list(weights.values())), strict=True):
                result[name][i] = gradient
        return result

    def _masked(self, values: dict[str, Tensor], scale: Union[float, Tensor]) -> dict[str, Tensor]:
        """Finite, scaled (all, or each gradient), and zero where a mask is False; in place."""
        sums = torch.stack([value.sum(dtype=torch.float64) for value in values.values()])
        if not sums.isfinite().all():
            bad = [name for name, value in values.items() if not value.isfinite().all()]
            if bad:
                raise ValueError(f"the gradients of {', '.join(bad)} contain NaN or inf")
        self.any_nonzero = self.any_nonzero or any(bool(value.any()) for value in values.values())
        for name, value in values.items():
            if 0 in value.stride():  # a gradient that is zero for all may be expanded
                values[name] = value = value.clone()
            if isinstance(scale, Tensor):
                value *= scale.view(-1, *[1] * (value.dim() - 1))
            elif scale != 1:
                value *= scale
            if name in self.masks:
                value *= self.masks[name]
        return values


class _LayerSource:
    """Inputs of the layers that own the weights, and gradients of each sample's loss by their outputs, by hooks."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        weights: Mapping[str, nn.Parameter],
        observer: Observer,
        draw: Optional[DrawLabels],
        chunk_bytes: int,
    ) -> None:
        self.model, self.loss_fn, self.observer, self.draw = model, loss_fn, observer, draw
        self.chunk_bytes = chunk_bytes
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
        self.layers = {name: owners[id(weight)] for name, weight in weights.items()}
        for module in self.layers.values():
            input_rows(module, None)
        self.backward = "output_gradients" in observer.observes
        self.outputs: list[tuple[str, Any]] = []  # of this forward pass: name and where its gradient will come by

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """With a hook on every layer."""
        handles = []
        try:
            for name, module in self.layers.items():
                handles.append(module.register_forward_hook(functools.partial(self._hook, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, inputs: Any, targets: Any, samples: int) -> None:
        """One forward pass, and a backward pass if gradients are observed."""
        if not self.backward:
            call(self.model, {}, inputs)
            return
        weights = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        self.outputs = []
        with torch.enable_grad():
            outputs = call(self.model, weights, inputs)
            reached, self.outputs = self.outputs, []
            if not reached:
                return
            scale: Union[float, Tensor] = 1.0
            if self.draw is not None:
                targets, scale = self.draw(pytree.tree_map(torch.detach, outputs), samples, samples)
            # One by one: the mean over several may weigh them by their targets.
            one = lambda i: pytree.tree_map(lambda x: x[i : i + 1], (outputs, targets))
            losses = torch.stack([scalar_loss(self.loss_fn, *one(i)) for i in range(samples)])
            loss = (losses * scale).sum()
        gradients = torch.autograd.grad(loss, [edge for _, edge in reached], allow_unused=True)
        for (name, _), gradient in zip(reached, gradients, strict=True):
            if gradient is not None:
                self._observe(name, "output_gradients", gradient, output_rows)

    def _hook(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        x = args[0].detach()
        if "inputs" in self.observer.observes:
            self._observe(name, "inputs", x, input_rows)
        if self.backward and output.requires_grad:
            # Not the tensor itself: an operation in place may make it another one.
            self.outputs.append((name, torch.autograd.graph.get_gradient_edge(output)))

    def _observe(self, name: str, what: str, x: Tensor, rows: Callable[[nn.Module, Tensor], Tensor]) -> None:
        if not x.sum(dtype=torch.float64).isfinite() and not x.isfinite().all():
            raise ValueError(f"the {what.replace('_', ' ')} of the layer of {name} contain NaN or inf")
        module = self.layers[name]
        per_sample = rows(module, x[:1]).numel() * x.element_size()
        for part in x.split(max(1, self.chunk_bytes // max(1, per_sample))):
            observed: dict[str, Any] = {what: {name: rows(module, part)}}
            self.observer.update(Observation(len(part), **observed))


def output_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Outputs of a Linear or Conv layer, or gradients by them, as [rows, fan_out]."""
    channels_last = x if isinstance(module, nn.Linear) else x.movedim(1, -1)
    return channels_last.reshape(-1, x.shape[-1] if isinstance(module, nn.Linear) else x.shape[1])


def input_rows(module: nn.Module, x: Optional[Tensor]) -> Tensor:
    """What the weight of a Linear or Conv layer is multiplied by: [rows, fan_in], or [groups, rows, fan_in].

    Args:
        module: nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d.
        x: the layer's input, at least one sample; None only asks whether the module is supported.

    Raises:
        NotImplementedError: another module.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]) if x is not None else torch.empty(0)
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise NotImplementedError(f"layer inputs of {type(module).__name__} are not observed, only of Linear and Conv")
    if x is None:
        return torch.empty(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    spatial = len(module.kernel_size)
    for dim in range(spatial):
        reach = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
        x = x.unfold(2 + dim, reach, module.stride[dim])[..., :: module.dilation[dim]]
    x = x.unflatten(1, (module.groups, -1))  # [N, g, C / g, *positions, *kernel]
    positions = range(3, 3 + spatial)
    kernel = range(3 + spatial, 3 + 2 * spatial)
    # Written column by column, in which neighbours in the input stay neighbours: several times faster than by rows.
    columns = x.permute(1, 2, *kernel, 0, *positions).flatten(1, 1 + spatial).flatten(2)  # [g, fan_in, rows]
    return columns.mT if module.groups > 1 else columns[0].mT


def require_rereadable(data: Iterable[Any], why: str) -> None:
    """Raise if the data can be iterated over only once."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"expected data that can be read again, as {why}, got a one-shot {type(data).__name__}; "
            "pass a list or a DataLoader"
        )


def mean_gradient(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction,
    weights: Mapping[str, nn.Parameter],
    *,
    num_samples: int,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The gradient of the mean loss over the first `num_samples` samples, by the name of the parameter.

    Raises:
        ValueError: no data, or gradients with NaN or inf, by parameter.
        TypeError: data that does not yield pairs of batches of tensors.
    """
    device = next(iter(weights.values())).device
    total = {name: torch.zeros_like(weight, dtype=widened(weight.dtype)) for name, weight in weights.items()}
    used = 0
    with running(model, device, seed), progress_bar(what="mean gradient", total=num_samples, show=progress) as bar:
        for inputs, targets, samples in chunks(data, CHUNK_SAMPLES, num_samples, device):
            free = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            with torch.enable_grad():
                loss = samples * scalar_loss(loss_fn, call(model, free, inputs), targets)
            grads = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
            for name, gradient in zip(free, grads, strict=True):
                if gradient is not None:
                    total[name] += gradient
            used += samples
            bar.update(samples)
    if not used:
        raise ValueError("expected data that yields at least one sample, got none")
    for name, gradient in total.items():
        if not gradient.isfinite().all():
            raise ValueError(f"the gradient of {name} contains NaN or inf")
    return {name: gradient / used for name, gradient in total.items()}


def losses_along(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction,
    weights: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    shares: Sequence[float],
    *,
    num_samples: int,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """The mean loss over the first `num_samples` samples at weights - share * direction, for each share.

    Args:
        model, data, loss_fn, num_samples, seed, progress: see `observe`.
        weights, direction: name of a parameter -> tensor.
        shares: how far to go.
    """
    device = next(iter(weights.values())).device
    total, used = torch.zeros(len(shares), dtype=torch.float64, device=device), 0
    with running(model, device, seed), progress_bar(what="step length", total=num_samples, show=progress) as bar:
        for inputs, targets, samples in chunks(data, CHUNK_SAMPLES, num_samples, device):
            for index, share in enumerate(shares):
                there = {name: (weight - share * direction[name]).to(weight.dtype) for name, weight in weights.items()}
                total[index] += samples * scalar_loss(loss_fn, call(model, there, inputs), targets)
            used += samples
            bar.update(samples)
    return (total / used).tolist()


def recalibrate_batchnorm(model: nn.Module, data: Iterable[Any], *, seed: int = 0, progress: bool = False) -> int:
    """Recompute the running statistics of every BatchNorm layer as means over all batches of the data.

    Args:
        model: any module; only running statistics change, and they not if anything is raised.
        data: as in `observe`; read to its end.
        seed: of PyTorch's RNG while the data is read.
        progress: show a progress bar.

    Returns:
        how many samples were used.

    Raises:
        ValueError: no data.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    before = [(norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    used = 0
    with running(model, device, seed), progress_bar(what="BatchNorm", show=progress) as bar:
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
            for inputs, _, samples in chunks(data, BATCHNORM_SAMPLES, sys.maxsize, device):
                if used and samples == 1:
                    break  # one sample alone may have no variance
                used += samples
                for norm in norms:
                    norm.momentum = samples / used  # so that every sample counts the same
                call(model, {}, inputs)
                bar.update(samples)
            if used == 0:
                raise ValueError("expected data that yields at least one sample, got none")
        except BaseException:
            for norm, (_, buffers) in zip(norms, before, strict=True):
                norm.load_state_dict(buffers, strict=False)
            raise
        finally:
            for norm, (momentum, _) in zip(norms, before, strict=True):
                norm.momentum = momentum
    return used
