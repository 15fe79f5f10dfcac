"""Natural-gradient steps with a learned inverse Fisher matrix."""

import contextlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fishleg_ext import ops
from fishleg_ext.common.arguments import (
    checked_count,
    checked_integer,
    checked_positive,
    checked_type,
    one_of,
)
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.state import state_entry
from fishleg_ext.common.waiting import read, read_by_name
from fishleg_ext.curvature.fishleg_adam import Adam
from fishleg_ext.curvature.kronecker import Factors
from fishleg_ext.observation.likelihoods import Likelihood, LossFunction
from fishleg_ext.optim.drawn import Drawn, DrawnGradients
from fishleg_ext.optim.forward import ForwardHooks
from fishleg_ext.optim.labels import Labels, checked_loss
from fishleg_ext.optim.layers import Diagonal, Layer, check_inverted, layers_of
from fishleg_ext.optim.options import OPTIONS, check_alone, check_finite, checked_adam, checked_share
from fishleg_ext.optim.running import DescendedFactors, RunningFactors
from fishleg_ext.optim.shared import OptimizerCurvature
from fishleg_ext.optim.step_length import StepLength

# Samples with labels of their own from which the step's length is measured: the last of a batch, since n may be long
# along inputs that Q does not know. It learns from those before them, or of a small batch from as many.
MEASURED = 64
# The curvature is updated and the step measured anew once gradients have so many times the norm of the last time.
CHANGE = 2.0
STATE = ("learned", "steps", "last_norm", "loss_scale", "length", "layers", "others")


class FishLeg(torch.optim.Optimizer):
    """Descends along the natural gradient Q g, Q the learned inverse of the Fisher matrix F of the loss.

    Garcia et al., FishLeg, ICLR 2023; with curvature="kronecker" it is K-FAC (Martens and Grosse, arXiv 1503.05671).
    In a step, with g the gradients that are in `.grad`:

        n <- momentum * n + (1 - momentum) Q g, divided by 1 - momentum^t;
        w <- w - c * lr * n - lr * weight_decay * w.

    Q = P (x) M for each weight matrix with its bias (see `RunningFactors`), and diagonal for other parameters. It is
    learned from gradients of labels that the model draws, as running means: every `update_every` steps the model runs
    once more, in the mode that it has, on the first `samples` of the inputs of the user's own forward pass, and on the
    last `MEASURED` for the length of the step. The other steps take no pass of their own.

    Q knows nothing of how layers move together, so the step's length is measured. Along n the quadratic model of the
    loss is least at c = g^T n / n^T (F + damping I) n, for which n^T F n is the mean over samples of (g_s^T n)^2, with
    the gradients g_s that were drawn, over all weight matrices; both are running means. For other parameters it is
    measured by itself, and a bound for both together is taken. lr = 1 is that whole step. And no step is so long that
    the outputs' distribution diverges by more than `max_divergence` in this model: 1/2 s^2 n^T F n for a step of s n.

    The gradients g_s are of other labels than those that Q learned from, as Q makes n short along the ones it knows.
    But before Q multiplies g, it has learned from inputs that g is of: along those that are new n is too long.

    Args:
        model: any module whose samples do not influence each other, but by BatchNorm; on one process alone.
        lr: share of the measured step: up to 1 with large batches, less with the noisy gradients of small ones.
            Learning-rate schedulers may change it.
        likelihood: of the model's outputs: "categorical", "tokens", "next_token", "gaussian", "bernoulli", or a
            function (outputs, generator) -> targets.
        loss_fn: (outputs, targets) -> scalar, the loss that is minimised; None is that of a named likelihood, the mean
            over all targets. A loss of another scale must be given: any multiple of that one, as a mean over samples,
            or a module of PyTorch with reduction="sum". Steps are those of the mean, in whose units F is. Beside a
            function it must be its negative log-likelihood, as a mean over samples, in whose units F is then.
        params: parameters of the model, or groups of them with options of their own (lr, momentum, weight_decay), as
            other optimizers take them; None is all that require gradients.
        curvature: "fishleg", or "kronecker" for K-FAC.
        adam: learn Q by Adam on the auxiliary loss, as the papers do, in place of closed-form updates: for comparison.
            Its steps, one for each part of a batch's gradients that memory is for, go on at a constant rate, and Q has
            no scale: `Adam(steps=None, scaled=False)`.
        momentum: share of n that a step leaves.
        weight_decay: decoupled from the gradient.
        damping: in the units of F, > 0.
        max_divergence: of one step, nats for each target of a named likelihood, and else in the units of the loss.
        samples: of a batch, at most, from which Q is learned; of a batch below 320 those by which the length is not
            measured, or as many as these. Where gradients have no factors, they are as many as 512 MiB hold.
        update_every: steps between updates of the running means.
        invert_every: steps between inversions of the factors, a multiple of update_every.
        warm_up: first steps, in each of which all of this is done: a network that has just been initialised changes
            quickly.
        memory: what share of the running means each update leaves of earlier ones.
        seed: of the labels.

    Raises:
        ValueError: there is no likelihood; parameters that are not the model's; a value out of range.
        TypeError: the loss is no function.
        NotImplementedError: this is one of several processes of torch.distributed.

    Examples:
        >>> model = nn.Linear(4, 3)
        >>> optimizer = FishLeg(model, likelihood="categorical")
        >>> loss = nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,)))
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.3,
        *,
        likelihood: Likelihood | None = None,
        loss_fn: LossFunction | None = None,
        params: Iterable[Any] | None = None,
        curvature: str = "fishleg",
        adam: Adam | None = None,
        momentum: float = 0.8,
        weight_decay: float = 0.0,
        damping: float = 3e-5,
        max_divergence: float = 0.02,
        samples: int = 256,
        update_every: int = 2,
        invert_every: int = 10,
        warm_up: int = 30,
        memory: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.model = checked_type("model", model, nn.Module, "an nn.Module")
        check_alone()
        likelihood, loss_fn = checked_loss(likelihood, loss_fn)
        self.curvature_model = one_of("fishleg", "kronecker")("curvature", curvature)
        self.adam = adam if adam is None else checked_adam(adam, curvature)
        self.damping = checked_positive("damping", damping)
        self._length = StepLength(self.damping, checked_positive("max_divergence", max_divergence))
        self.samples, self.warm_up = checked_count("samples", samples), checked_count("warm_up", warm_up)
        self.update_every = checked_count("update_every", update_every)
        self.invert_every = checked_count("invert_every", invert_every)
        if self.invert_every % self.update_every:
            raise ValueError(
                f"expected invert_every to be a multiple of update_every={self.update_every}, got {invert_every}"
            )
        self.memory = checked_share("memory", memory)
        self.seed = checked_integer("seed", seed)
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._made = False
        super().__init__([p for p in model.parameters() if p.requires_grad] if params is None else params, options)
        self._made = True
        held = [p for group in self.param_groups for p in group["params"]]
        self._parameters = {self._names[id(p)]: p for p in held}
        self._kinds = {name: (p.shape, p.dtype, p.device) for name, p in self._parameters.items()}
        self._layers, self._others = layers_of(model, self._parameters, self._make_factors)
        self._labels = Labels(likelihood, loss_fn, next(iter(self._parameters.values())).device)
        self._unknown = set(self._parameters)  # those without curvature, as no drawn gradient was other than zero
        self._held_at = self._places()
        self._drawn = self._make_drawn()
        self._forward = ForwardHooks(model, self._layers)
        self._warned: set[str] = set()  # of those, by a word
        self._masks: dict[int, Callable[[], Iterable[tuple[Tensor, Tensor]]]] = OrderedDict()
        self._steps = 0
        self._last_norm = 0.0  # of gradients, when the length was measured

    @property
    def curvature(self) -> OptimizerCurvature:
        """Return a recipe for `curvature=` of `Pruner` and `prune`: each estimate is what Q has learned by then.

        It takes no data. See `OptimizerCurvature`.
        """
        return OptimizerCurvature(source=self)

    @property
    def structure(self) -> dict[str, str]:
        """Map each parameter by name to the structure of its Q: "kronecker", "diagonal", or "bias of" a weight."""
        found = dict.fromkeys((other.name for other in self._others), "diagonal")
        for layer in self._layers:
            found |= {layer.name: "kronecker"} | ({} if layer.bias is None else {layer.bias: f"bias of {layer.name}"})
        return {name: found[name] for name in self._parameters}

    @torch.no_grad()
    def factors(self, name: str, weight: Tensor, damping: float, bias: str | None) -> Factors:
        """Return the inverse of each row of a weight by itself, as pruning needs it.

        Args:
            name: of the weight.
            weight: as a matrix [o, ...].
            damping: of F.
            bias: name of the bias that is the last column, if any is.

        Raises:
            ValueError: the optimizer does not have the weight or the bias, or has taken no step.
        """
        if not self._steps:
            raise ValueError("the optimizer has taken no step, so that it knows nothing of the curvature yet")
        for layer in self._layers:
            if layer.name == name:
                return layer.factors(weight, damping, bias)
        others = {other.name: other for other in self._others}
        for needed in (name, bias):
            if needed is not None and needed not in others:
                raise ValueError(f"the optimizer does not have {needed}; it has {', '.join(self._parameters)}")
        return others[name].factors(weight, damping, None if bias is None else others[bias])

    def follow_masks(self, masks: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> RemovableHandle:
        """Stay within the weights that masks keep, which is what `Pruner.attach` asks for.

        Gradients of pruned weights are left out before Q multiplies them, and so is what Q g has for these.

        Args:
            masks: () -> pairs of a parameter and its bool mask, True = kept, as they are now.

        Returns:
            a handle; its `remove()` ends this.
        """
        handle = RemovableHandle(self._masks)
        self._masks[handle.id] = masks
        return handle

    def __reduce__(self) -> Any:
        """Refuse copies: the hooks are of one model."""
        raise TypeError(
            "FishLeg cannot be copied or pickled, as it sees the forward passes of its own model: make one for the "
            "other model, and give it the state_dict"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group of parameters of the model, while the optimizer is made.

        Raises:
            ValueError: they are not the model's, or an option is out of range.
            NotImplementedError: the optimizer has been made.
        """
        if self._made:
            raise NotImplementedError("FishLeg takes no parameters later on: make a new optimizer of all of them")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for option, check in OPTIONS.items():
            group[option] = check(option, group[option])
        if strange := [p for p in group["params"] if id(p) not in self._names]:
            raise ValueError(
                f"expected parameters of the model, got {len(strange)} that are not, the first of shape "
                f"{list(strange[0].shape)}; was the model copied, or moved, after they were taken?"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with the gradients that are in `.grad`.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.

        Raises:
            ValueError: the loss, a gradient or a drawn gradient is not finite; the model's arguments are no batch of
                samples, or its outputs do not fit the likelihood.
            TypeError: gradients are sparse.
            RuntimeError: the model was not called since this was made; parameters were replaced or changed shape.
            CurvatureError: the running factors have no inverse.

        If anything is raised, weights, momentum and curvature are as before, but for what Adam has learned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            value = 0.0 if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss)
            if not math.isfinite(value):
                raise ValueError(f"expected closure to return a finite loss, got {value}")
        kinds = {parameter.device.type for parameter in self._parameters.values()}
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            self._step()
        return loss

    def _step(self) -> None:
        grads, norms = self._gradients()
        if not grads:
            return
        norm = math.hypot(*norms.values())
        number = self._steps + 1
        changed = norm > CHANGE * self._last_norm  # by pruning, or by a step that was too long
        first = number <= self.warm_up or changed
        due = first or number % self.update_every == 0
        parts = [self._labels, *(layer.running for layer in self._layers), *self._others]
        before = [vars(part).copy() for part in parts]
        try:
            drawn, measured = self._observe(number) if due else (None, None)
            unknown = self._unknown
            if drawn is not None:
                self._learn(drawn)
                unknown = self._without_curvature()
            if first or number % self.invert_every == 0 or unknown != self._unknown:
                check_inverted({layer.name: layer.running.invert(self.damping) for layer in self._layers})
            still = [name for name in grads if name in unknown and norms[name]]
            grads = {name: grad for name, grad in grads.items() if name not in unknown}
            loss_scale = self._labels.scale * (self._forward.samples if self._labels.summed else 1)
            if grads and loss_scale != 1:
                grads = dict(zip(grads, torch._foreach_div(list(grads.values()), loss_scale), strict=True))
            momenta, moved = self._move(grads) if grads else ({}, {})
            numbers = None if measured is None or not grads else self._measure(grads, moved, measured)
            check_finite(moved, numbers)
        except BaseException:
            for part, values in zip(parts, before, strict=True):
                vars(part).update(values)
            raise
        self._steps, self._unknown = number, unknown
        for name, momentum in momenta.items():
            state = self.state[self._parameters[name]]
            state["steps"], state["momentum"] = state.get("steps", 0) + 1, momentum
        if numbers is not None:
            self._last_norm = norm
            self._length.measure(*numbers)
        self._descend(moved)
        if new := [name for name in still if name not in self._warned]:
            self._warned |= set(new)
            warnings.warn(
                f"{', '.join(new)} did not move: the loss has gradients by them, but with labels that the model draws "
                "it has none, as of what enters in another way than through the outputs that these are drawn from. "
                "They will move once it has; or give params= without them, and another optimizer for them",
                stacklevel=5,
            )

    def _make_drawn(self) -> DrawnGradients:
        layers = {layer.name: layer for layer in self._layers}
        return DrawnGradients(
            self.model,
            {name: p for layer in self._layers for name, p in layer.parameters.items()},
            {other.name: other.parameter for other in self._others},
            {layer.name: layer.orientation for layer in self._layers},
            {layer.name: layer.bias for layer in self._layers if layer.bias is not None},
            self._labels,
            lambda name, factors: layers[name].bytes_of(factors),
        )

    def _places(self) -> list[int]:
        """Return where the values of parameters lie in memory."""
        return [parameter.data_ptr() for parameter in self._parameters.values()]

    def _make_factors(self, rows: int, cols: int, like: Tensor) -> RunningFactors | DescendedFactors:
        if self.adam is not None:
            return DescendedFactors(rows, cols, like, self.adam, self.damping, self.seed)
        return RunningFactors(rows, cols, like, learned=self.curvature_model == "fishleg")

    def _gradients(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the gradients by name, checked, and their norms."""
        named = dict(self.model.named_parameters())
        grads: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            current, kind = named.get(name), (parameter.shape, parameter.dtype, parameter.device)
            if current is None or current is not parameter or kind != self._kinds[name]:
                raise RuntimeError(
                    f"{name} was replaced in the model, moved, or changed its shape or dtype, since this optimizer was "
                    "made; make a new one"
                )
            if parameter.grad is not None:
                if parameter.grad.layout is not torch.strided:
                    raise TypeError(f"expected dense gradients, got those of {name} as {parameter.grad.layout}")
                grads[name] = parameter.grad
        found = read(torch._foreach_norm(list(grads.values()), dtype=torch.float64)) if grads else []
        norms = dict(zip(grads, found, strict=True))
        if bad := [name for name, norm in norms.items() if not math.isfinite(norm)]:
            raise ValueError(f"the gradients of {', '.join(bad)} contain NaN or inf; nothing was changed")
        if bad_rates := [group["lr"] for group in self.param_groups if not 0 <= float(group["lr"]) < math.inf]:
            raise ValueError(f"expected learning rates to be finite and >= 0, got {float(bad_rates[0])}")
        if (places := self._places()) != self._held_at:  # by the observers
            self._held_at, self._drawn = places, self._make_drawn()
        return grads, norms

    def _observe(self, number: int) -> tuple[Drawn, Drawn]:
        """Draw labels for samples of the last forward pass, to learn from and to measure by; others for each number."""
        if self._forward.called is None:
            raise RuntimeError(
                "the model was not called with gradients enabled since this optimizer was made: expected loss = "
                "loss_fn(model(inputs), targets); loss.backward(); step(), with the model that it was given; of a "
                "compiled model give it what torch.compile(model) returned, as the calls of one that was compiled in "
                "place, or within a compiled function, cannot be seen"
            )
        if self._forward.overwritten:
            raise RuntimeError(
                "the model wrote into its inputs during its forward pass, which is to be repeated: expected a forward "
                "that leaves them as they are"
            )
        seed = ((self.seed << 32) + number) % 2**63
        return self._drawn.observe(self._forward.called, self.samples, MEASURED, seed)

    def _without_curvature(self) -> set[str]:
        """Return the parameters of which no drawn gradient was other than zero so far."""
        if not self._unknown:
            return self._unknown
        layers = {layer.name: layer.running.mean_square() for layer in self._layers}
        found = read_by_name(layers | {other.name: other.squares.sum() for other in self._others})
        found |= {name: found[layer.name] for layer in self._layers for name in layer.parameters}
        return {name for name in self._unknown if not found.get(name, 1.0)}  # empty ones have none

    def _learn(self, drawn: Drawn) -> None:
        for layer in self._layers:
            layer.observe(drawn.observations, self.memory)
        for other in self._others:
            other.observe(drawn.groups[other.name], self.memory)

    def _move(self, grads: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the momentum of each parameter after Q g, and n, which is corrected for its start."""
        pairs = [pair for masks in self._masks.values() for pair in masks() if id(pair[0]) in self._names]
        masks = {self._names[id(parameter)]: mask for parameter, mask in pairs}
        grads = {name: grad * masks[name] if name in masks else grad for name, grad in grads.items()}
        directions: dict[str, Tensor] = {}
        layers = [layer for layer in self._layers if not layer.parameters.keys().isdisjoint(grads)]
        matrices = {layer.name: layer.matrix(grads) for layer in layers}
        whole = [
            x.name for x in layers if x.parameters.keys() <= grads.keys() and x.parameters.keys().isdisjoint(masks)
        ]
        factors = self._forward.factors({name: matrices[name] for name in whole})
        for layer in layers:
            if layer.name in factors:
                d, x = factors[layer.name]
                directions |= layer.parts((d @ layer.running.row).mT @ (x @ layer.running.col))
        layers = [layer for layer in layers if layer.name not in factors]
        rows, cols = [layer.running.row for layer in layers], [layer.running.col for layer in layers]
        products = ops.foreach_kron_mul([matrices[layer.name] for layer in layers], rows, cols, [None] * len(layers))
        for layer, product in zip(layers, products, strict=True):
            directions |= layer.parts(product)
        for other in self._others:
            if other.name in grads:
                directions[other.name] = other.solve(grads[other.name], self.damping)
        momenta: dict[str, Tensor] = {}
        moved: dict[str, Tensor] = {}
        for group in self.param_groups:
            by_name = {self._names[id(p)]: p for p in group["params"] if self._names[id(p)] in grads}
            if not by_name:
                continue
            states = [self.state.get(parameter, {}) for parameter in by_name.values()]
            held_by = zip(states, by_name.values(), strict=True)
            held = [state["momentum"] if state else torch.zeros_like(parameter) for state, parameter in held_by]
            found = [directions[name].to(parameter.dtype) for name, parameter in by_name.items()]
            new = dict(zip(by_name, torch._foreach_lerp(held, found, 1 - group["momentum"]), strict=True))
            for name in new.keys() & masks.keys():
                new[name].mul_(masks[name])
            shares = [1 - group["momentum"] ** (state.get("steps", 0) + 1) for state in states]
            momenta |= new
            moved |= zip(by_name, torch._foreach_div(list(new.values()), shares), strict=True)
        return momenta, moved

    def _measure(
        self, grads: Mapping[str, Tensor], moved: Mapping[str, Tensor], drawn: Drawn
    ) -> tuple[float, float, float]:
        """Return g^T n, n^T F n and |n|^2, of n made shorter where the learning rate is less than the largest."""
        rates = [float(group["lr"]) for group in self.param_groups]
        if (longest := max(rates)) and min(rates) != longest:
            groups = zip(self.param_groups, rates, strict=True)
            by_name = {self._names[id(p)]: rate / longest for group, rate in groups for p in group["params"]}
            shares = [by_name[name] for name in moved]
            moved = dict(zip(moved, torch._foreach_mul(list(moved.values()), shares), strict=True))
        moving = [layer for layer in self._layers if not layer.parameters.keys().isdisjoint(moved)]
        layers = [(layer, layer.matrix(moved)) for layer in moving]
        zero = torch.zeros((), dtype=torch.float64)
        of_layers = [
            sum((layer.gradients(observation).along(matrix).double() for layer, matrix in layers), zero)
            for observation in drawn.observations
        ]
        others = [other.name for other in self._others if other.name in moved]
        of_others = sum(
            (drawn.groups[name].flatten(1).double() @ moved[name].flatten().double() for name in others), zero
        )
        directions = [n.to(widened(n.dtype)) for n in moved.values()]
        given = [grads[name].to(n.dtype) for name, n in zip(moved, directions, strict=True)]
        slopes = [product.sum(dtype=torch.float64) for product in torch._foreach_mul(given, directions)]
        norms = torch._foreach_norm(directions, dtype=torch.float64)
        alongs = [torch.cat([x.reshape(-1) for x in of_layers] or [zero[None]]), of_others]
        numbers = read([*(x.square().mean() for x in alongs), *slopes, *norms])
        n_f_n = sum(x**0.5 for x in numbers[:2]) ** 2  # at most this, for any correlation of the two
        slope, squared = sum(numbers[2 : 2 + len(moved)]), sum(x**2 for x in numbers[2 + len(moved) :])
        return slope, n_f_n, squared

    def _descend(self, moved: Mapping[str, Tensor]) -> None:
        rate = self._length.rate(max(float(group["lr"]) for group in self.param_groups))
        for group in self.param_groups:
            parameters = [p for p in group["params"] if self._names[id(p)] in moved]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - float(group["lr"]) * group["weight_decay"])
            directions = [moved[self._names[id(parameter)]] for parameter in parameters]
            torch._foreach_sub_(parameters, directions, alpha=float(group["lr"]) * rate)

    def state_dict(self) -> dict[str, Any]:
        """Return momentum and options, as other optimizers do, and what the curvature has learned under "fishleg"."""
        own = {
            "learned": self.curvature_model == "fishleg",
            "steps": self._steps,
            "last_norm": self._last_norm,
            "loss_scale": self._labels.scale,
            "length": self._length.state_dict(),
            "layers": {layer.name: layer.running.state_dict() for layer in self._layers},
            "others": {other.name: other.state_dict() for other in self._others},
        }
        return {**super().state_dict(), "fishleg": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned, of an optimizer of the same parameters; settings stay those of this one.

        Raises:
            ValueError: the state is of another optimizer, or of other parameters; nothing is changed then.
        """
        own = state_entry(state_dict, "fishleg", "FishLeg")
        learned, steps, last_norm, loss_scale, length, layers, others = (
            state_entry(own, key, "FishLeg") for key in STATE
        )
        if (model := "fishleg" if learned else "kronecker") != self.curvature_model:
            raise ValueError(f"expected the state of curvature={self.curvature_model!r}, got that of {model!r}")
        parts: tuple[tuple[str, Sequence[Layer | Diagonal], Any], ...] = (
            ("layers", self._layers, layers),
            ("parameters", self._others, others),
        )
        for what, known, given in parts:
            if (names := [part.name for part in known]) != list(given):
                raise ValueError(f"expected the state of {what} {', '.join(names)}, got that of {', '.join(given)}")
            for part in known:
                checked = part.running if isinstance(part, Layer) else part
                checked.check_state(part.name, given[part.name])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "fishleg"})
        for layer in self._layers:
            layer.running.load_state_dict(layers[layer.name])
        for other in self._others:
            other.load_state_dict(others[other.name])
        self._steps, self._last_norm = int(steps), float(last_norm)
        self._labels.scale, self._labels.is_checked = float(loss_scale), self._steps > 0
        self._length.load_state_dict(length)
        self._unknown = set(self._parameters)
        self._unknown = self._without_curvature()
