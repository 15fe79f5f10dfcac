"""Targets sampled from a model's own likelihood, with which mean g g^T estimates the true Fisher matrix."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LossFunction = Callable[[Any, Any], Tensor]
Likelihood = str | Callable[[Any, torch.Generator], Any]
LossHessian = Callable[[Tensor, Tensor], Tensor]
IGNORED = -100  # the class of a target that PyTorch's cross entropy leaves out, unless told otherwise


def checked_likelihood(name: str, value: Any) -> Likelihood:
    """Return `value` if it is the name of a likelihood or a function."""
    if not (callable(value) or (isinstance(value, str) and value in LIKELIHOODS)):
        raise ValueError(f"expected {name} to be one of {', '.join(LIKELIHOODS)} or a function, got {value!r}")
    return value


@dataclass(frozen=True)
class NamedLikelihood:
    """A likelihood that losses of PyTorch are the negative logarithm of, as means over all targets.

    Attributes:
        sample: (outputs, generator) -> targets.
        loss: (outputs, targets) -> the mean negative logarithm, but for constants.
        hessian: (outputs, v) -> H v, H the second derivative of the mean loss by the outputs; None where none is there.
        sample_by_importance: (outputs [N, C], generator) -> a target for each sample, and a factor [N] for its
            gradient; None where targets are drawn as they are distributed.
        class_dim: dimension of the outputs that goes over classes; None where targets are no classes.
        shift: how many positions later than the outputs, along dimension 1, targets lie.
        divergence: (outputs, others) -> Kullback-Leibler divergence of the others' distribution from that of the
            outputs, for each target.
    """

    sample: Callable[[Tensor, torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    hessian: LossHessian | None = None
    sample_by_importance: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None
    class_dim: int | None = None
    shift: int = 0
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None


class LabelSampler:
    """Draws targets from a model's outputs.

    Args:
        likelihood: a named one; or (outputs, generator) -> targets, for a loss that is the mean over samples; None for
            a model with a loss of its own, which it is then found from.
        ignore_index: class of the targets that the loss leaves out.
        summed: whether the loss of a sample is the sum over its targets, not the mean.
    """

    def __init__(
        self,
        likelihood: NamedLikelihood | Callable[[Any, torch.Generator], Any] | None,
        *,
        ignore_index: int = IGNORED,
        summed: bool = False,
    ) -> None:
        self.likelihood, self.ignore_index, self.summed = likelihood, ignore_index, summed

    def draw(
        self, generator: torch.Generator, outputs: Any, targets: Any, samples: int, count: int
    ) -> tuple[Any, float | Tensor]:
        """Draw targets, and a factor that makes the mean square of `count` gradients that of the Fisher matrix.

        Args:
            generator: of random numbers.
            outputs: of the model.
            targets: those of the data: where they are ignored, they stay. None where there are none.
            samples, count: how many gradients of how many samples in all the factor is for.

        Returns:
            targets for all samples, and a factor for all gradients or [count] of them.

        Raises:
            TypeError, ValueError: outputs that the likelihood cannot be of, or drawn targets of another shape than
                those of the data.
        """
        if self.likelihood is None:
            self.likelihood = _own_likelihood(outputs, targets)
        if not isinstance(self.likelihood, NamedLikelihood):
            return self._drawn_by_function(self.likelihood(outputs, generator), samples), (samples / count) ** 0.5
        logits = logits_of(outputs)
        known = self.likelihood
        if known.sample_by_importance is not None and samples == count and logits.dim() == 2:
            drawn, factor = known.sample_by_importance(logits, generator)
            ignored = self._ignored(drawn, targets)
            if ignored is None:
                return drawn, factor
            return torch.where(ignored, targets, drawn), torch.where(ignored, 0, factor)
        drawn = known.sample(logits, generator)
        if known.shift:
            if targets is None:
                targets = torch.zeros_like(drawn)  # of which the loss reads none of the first
            if not isinstance(targets, Tensor) or targets.shape != drawn.shape:
                raise ValueError(_unlike(drawn, targets))
            drawn = torch.cat([targets[:, : known.shift], drawn[:, : -known.shift]], dim=1)
        ignored = self._ignored(drawn, targets)
        terms: int | Tensor = drawn[:, known.shift :].numel() if known.shift else drawn.numel()
        if ignored is not None:
            drawn = torch.where(ignored, targets, drawn)
            terms = (~ignored[:, known.shift :] if known.shift else ~ignored).reshape(count, -1).sum(1) * count
        # The mean of t independent terms has a gradient whose square is Fisher / t.
        return drawn, ((samples if self.summed else terms) / count) ** 0.5

    def _ignored(self, drawn: Tensor, targets: Any) -> Tensor | None:
        """Find where the data's targets are left out by the loss; None where it leaves out none."""
        assert isinstance(self.likelihood, NamedLikelihood)
        if not isinstance(targets, Tensor):
            return None
        probabilities = self.likelihood.class_dim is not None and targets.is_floating_point()
        if not probabilities and targets.shape != drawn.shape:
            raise ValueError(_unlike(drawn, targets))
        if self.likelihood.class_dim is None or probabilities:
            return None
        return targets == self.ignore_index

    def _drawn_by_function(self, targets: Any, samples: int) -> Any:
        for leaf in pytree.tree_leaves(targets):
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                raise TypeError(f"expected likelihood to draw a tensor with a target for each sample, got {leaf!r}")
            if len(leaf) != samples:
                raise ValueError(f"expected likelihood to draw targets for {samples} samples, got {len(leaf)}")
        return targets

    def check(self, loss_fn: LossFunction, outputs: Any, targets: Any) -> None:
        """Raise ValueError unless the loss reads targets as the likelihood draws them.

        Args:
            loss_fn: the loss.
            outputs: of the model, for one sample or more.
            targets: drawn for them.
        """
        others = self._others(outputs, targets)
        ours, theirs = (_output_gradients(loss_fn, outputs, t) for t in (targets, others))
        if not ours:
            return
        same = lambda a, b: isinstance(a, Tensor) and torch.equal(a, b)
        drawn_anew = zip(pytree.tree_leaves(targets), pytree.tree_leaves(others), strict=True)
        if all(map(torch.equal, ours, theirs)) and not all(same(a, b) for a, b in drawn_anew):
            raise ValueError(
                "the loss does not depend on the targets that are drawn from the model: expected a loss_fn that reads "
                "its targets, or, where it can be chosen, labels='data'"
            )
        if not isinstance(self.likelihood, NamedLikelihood) or (dim := self.likelihood.class_dim) is None:
            return
        gradient = ours[0].double()
        if gradient.sum(dim).abs().max() > 1e-2 * gradient.abs().sum(dim).max():
            raise ValueError(
                f"the loss is not that of the likelihood, which has classes in dimension {dim} of outputs of shape "
                f"{list(gradient.shape)}; 'tokens' and 'next_token' have them in the last, and a function may be given"
            )

    def _others(self, outputs: Any, targets: Any) -> Any:
        """Other targets than these, of the same kind."""
        if not isinstance(self.likelihood, NamedLikelihood):
            assert self.likelihood is not None
            device = next((x.device for x in pytree.tree_leaves(targets) if isinstance(x, Tensor)), "cpu")
            return self.likelihood(outputs, torch.Generator(device).manual_seed(1))
        if targets.is_floating_point():
            return 1 - targets
        return torch.where(targets == self.ignore_index, targets, (targets - 1).abs())  # 0 becomes 1


def _unlike(drawn: Tensor, targets: Any) -> str:
    got = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
    return (
        f"labels='model' draws targets of shape {list(drawn.shape)}, but those of the data are {got}: the likelihood "
        "is not that of the loss. 'categorical' has classes in dimension 1, 'tokens' and 'next_token' in the last; or "
        "give likelihood= as a function (outputs, generator) -> targets"
    )


def logits_of(outputs: Any) -> Tensor:
    """The tensor that targets are drawn from."""
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"expected a tensor of outputs, or outputs with logits, got a {type(outputs).__name__}; "
            "give likelihood= as a function (outputs, generator) -> targets"
        )
    return logits


def _output_gradients(loss_fn: LossFunction, outputs: Any, targets: Any) -> list[Tensor]:
    """Gradients of a loss by the model's outputs, that it depends on."""
    leaves, spec = pytree.tree_flatten(outputs)
    with torch.enable_grad():
        free = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
        loss = loss_fn(pytree.tree_unflatten(free, spec), targets)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return []
        tensors = [x for x in free if isinstance(x, Tensor) and x.requires_grad]
        found = torch.autograd.grad(loss.sum(), tensors, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def _own_likelihood(outputs: Any, labels: Any) -> NamedLikelihood:
    """The named likelihood that the loss in a model's outputs is of."""
    logits = logits_of(outputs)
    loss = getattr(outputs, "loss", None)
    differences: dict[str, float] = {}  # of networks that know nothing yet several losses are about the same
    if isinstance(labels, Tensor) and isinstance(loss, Tensor) and not labels.is_floating_point():
        for name in ("categorical", "tokens", "next_token"):
            known = LIKELIHOODS[name]
            z = logits if known.class_dim == 1 else logits.movedim(-1, 1)
            if known.shift and (z.dim() < 3 or labels.dim() < 2):
                continue
            z, t = (z[:, :, :-1], labels[:, 1:]) if known.shift else (z, labels)
            if z.shape[:1] + z.shape[2:] == t.shape and (t < z.shape[1]).all():
                expected = nn.functional.cross_entropy(z.float(), t)
                if torch.isclose(expected, loss.float(), rtol=1e-2, atol=1e-4):
                    differences[name] = float((expected - loss.float()).abs().detach())
    if differences:
        return LIKELIHOODS[min(differences, key=lambda name: differences[name])]
    raise ValueError(
        "the model's own loss is none of categorical, tokens and next_token, by which labels could be drawn: give "
        "labels='data', or a loss_fn and likelihood="
    )


@dataclass(frozen=True)
class OwnLoss:
    """The loss that a model returns, as a function of its outputs and labels.

    Attributes:
        likelihood: that it is the mean negative logarithm of.
    """

    likelihood: NamedLikelihood

    @classmethod
    def of(cls, outputs: Any, labels: Any) -> "OwnLoss | None":
        """Find the loss that these outputs have; None where it is of none of the likelihoods of classes alone."""
        try:
            found = cls(_own_likelihood(outputs, labels))
        except (TypeError, ValueError):
            return None
        return found if found.agrees(outputs, labels) else None

    def agrees(self, outputs: Any, labels: Any) -> bool:
        """Tell whether it is, but for rounding, the loss that the outputs have."""
        own = getattr(outputs, "loss", None)
        if not isinstance(own, Tensor):
            return False
        share = 1e-5 if own.dtype.itemsize >= 4 else 2 * torch.finfo(own.dtype).eps
        return bool(
            torch.isclose(
                self(outputs, labels).detach().double(), own.detach().double(), rtol=share, atol=0.0, equal_nan=True
            )
        )

    def check(self, outputs: Any, labels: Any) -> None:
        """Raise ValueError where it is not the loss that the outputs of a later batch have."""
        if isinstance(getattr(outputs, "loss", None), Tensor) and not self.agrees(outputs, labels):
            raise ValueError(
                "the loss that the model returns was the mean cross entropy of its targets in the first batch, but not "
                "in a later one; does it leave out targets other than -100? Give loss_fn=, such as "
                "torch.nn.CrossEntropyLoss(ignore_index=...) of the logits"
            )

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss, in single precision at least."""
        logits = logits_of(outputs)
        return self.likelihood.loss(logits.float() if logits.dtype.itemsize < 4 else logits, targets)


def as_module(loss_fn: LossFunction | None) -> LossFunction | None:
    """Return a partial application of PyTorch's cross entropy as the module that it is, others as they are."""
    if isinstance(loss_fn, functools.partial) and loss_fn.func is nn.functional.cross_entropy and not loss_fn.args:
        return nn.CrossEntropyLoss(**loss_fn.keywords)
    return loss_fn


def sample_loss(loss_fn: LossFunction | None) -> LossFunction | None:
    """Return the loss as a mean over samples, whatever its reduction, with class weights not divided out again.

    PyTorch's cross entropy with class weights is a weighted mean, in which the weight of a single sample has no effect.
    Here it is the sum of weighted terms over their number.
    """
    loss_fn = as_module(loss_fn)
    if isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)) and loss_fn.weight is not None:
        given, total_fn = loss_fn, copy.copy(loss_fn)
        total_fn.reduction = "sum"

        def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
            total = total_fn(outputs, targets)
            if given.reduction == "sum":
                return total / len(targets)
            if targets.is_floating_point():
                return total / (outputs.numel() / outputs.shape[1])
            return total / (targets != given.ignore_index).sum().clamp(min=1)

        return weighted
    if isinstance(loss_fn, nn.modules.loss._Loss) and loss_fn.reduction == "sum":
        summed = loss_fn
        return lambda outputs, targets: summed(outputs, targets) / len(targets)
    return loss_fn


def label_sampler(labels: str, loss_fn: LossFunction | None, likelihood: Likelihood | None) -> LabelSampler | None:
    """Choose how targets are drawn, or return None to take those of the data.

    A named likelihood goes with a loss that is the mean over all targets, as PyTorch's are by default (over outputs and
    positions too), or the sum with reduction="sum"; a function goes with one that is the mean over samples.

    Raises:
        ValueError: labels is neither "data" nor "model", or the likelihood is unknown or cannot be told; class weights,
            with which the loss is that of no likelihood.
    """
    if labels not in ("data", "model"):
        raise ValueError(f"expected labels to be 'data' or 'model', got {labels!r}")
    if likelihood is not None:
        checked_likelihood("likelihood", likelihood)
    if labels == "data":
        return None
    loss_fn = as_module(loss_fn)
    weighted = isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)) and loss_fn.weight is not None
    if weighted and not callable(likelihood):
        raise ValueError(
            f"labels='model' cannot be combined with {type(loss_fn).__name__}(weight=...), which is the negative "
            "log-likelihood of no distribution: give labels='data', or leave the class weights out"
        )
    summed = isinstance(loss_fn, nn.modules.loss._Loss) and loss_fn.reduction == "sum"
    ignore_index = getattr(loss_fn, "ignore_index", IGNORED)
    if callable(likelihood):
        return LabelSampler(likelihood)
    if loss_fn is None and likelihood is None:
        return LabelSampler(None)
    return LabelSampler(LIKELIHOODS[_named(loss_fn, likelihood)], ignore_index=ignore_index, summed=summed)


def output_divergence(loss_fn: LossFunction | None, likelihood: Likelihood | None) -> Callable[[Any, Any, Any], Tensor]:
    """Return (outputs, other outputs, targets) -> divergence of the others, a mean over targets, for each sample.

    Targets that are ignored are left out.

    Raises:
        ValueError: the likelihood is a function, or cannot be told.
    """
    if callable(likelihood):
        raise ValueError(
            f"expected likelihood to be one of {', '.join(LIKELIHOODS)} for the divergence, got a function"
        )
    own = loss_fn is None and likelihood is None
    named = None if own else LIKELIHOODS[_named(loss_fn, likelihood)]
    ignore_index = getattr(loss_fn, "ignore_index", IGNORED)

    def between(outputs: Any, others: Any, targets: Any) -> Tensor:
        known = named if named is not None else _own_likelihood(outputs, targets)
        assert known.divergence is not None
        values = known.divergence(logits_of(outputs).double(), logits_of(others).double())
        weights = torch.ones_like(values)
        if known.class_dim is not None and isinstance(targets, Tensor) and not targets.is_floating_point():
            shifted = targets[:, known.shift :] if known.shift else targets
            values = values[:, : -known.shift] if known.shift else values
            weights = (shifted != ignore_index).to(values) if shifted.shape == values.shape else torch.ones_like(values)
        flat = (values * weights).reshape(len(values), -1).sum(1)
        return flat / weights.reshape(len(values), -1).sum(1).clamp(min=1)

    return between


def loss_hessian(loss_fn: LossFunction | None, likelihood: Likelihood | None) -> LossHessian:
    """Return (outputs, v) -> H v, H the second derivative by the outputs of the mean negative log-likelihood.

    Raises:
        ValueError: the likelihood is a function or unknown, or cannot be told.
    """
    known = [name for name, entry in LIKELIHOODS.items() if entry.hessian is not None]
    name = likelihood if callable(likelihood) or likelihood is not None else _named(loss_fn, None)
    hessian = LIKELIHOODS[name].hessian if isinstance(name, str) and name in known else None
    if hessian is None:
        raise ValueError(
            f"expected likelihood to be one of {', '.join(known)} for products with the Fisher matrix, got {name!r}"
        )

    def of_tensors(outputs: Tensor, v: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise TypeError(f"expected a tensor of outputs, got a {type(outputs).__name__}")
        return hessian(outputs, v)

    return of_tensors


def _named(loss_fn: LossFunction | None, likelihood: str | None) -> str:
    """Name of the likelihood given, or of the loss."""
    if likelihood is not None:
        return likelihood
    if loss_fn is not nn.functional.cross_entropy and not isinstance(loss_fn, nn.CrossEntropyLoss):
        raise ValueError(
            "expected likelihood= for the true Fisher matrix (labels='model') of another loss than cross_entropy: "
            f"{', '.join(map(repr, LIKELIHOODS))} or a function (outputs, generator) -> targets"
        )
    return "categorical"


def _categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw classes from logits [N, C, ...]."""
    return _tokens(logits.movedim(1, -1), generator)


def _tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw classes from logits [N, ..., C]."""
    probabilities = _finite(logits).float().softmax(-1)
    drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return drawn.reshape(probabilities.shape[:-1])


def _informative_classes(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw classes from logits [N, C] as often as they matter for the Fisher matrix, and a factor for each.

    The Fisher matrix of a sample is sum_c p_c g_c g_c^T, and g_c, the gradient for class c, goes through e_c - p at the
    logits. A network that is sure of its answers hardly ever draws another class c from p, yet these make up nearly all
    of the sum: few gradients in a thousand would carry the estimate. Classes are drawn from
    q_c ~ p_c |e_c - p|^2 instead, and sqrt(p_c / q_c) g_c has the same mean square as g_c drawn from p, and at the
    logits the same norm whatever class is drawn: the proposal of the least variance there.
    """
    p = _finite(logits).double().softmax(1)
    others = p.sum(1, keepdim=True) - p  # 1 - p_c
    norm = p.square().sum(1, keepdim=True) - p.square() + others.square()  # |e_c - p|^2
    weight = p * norm
    total = weight.sum(1, keepdim=True)
    q = torch.where(total > 0, weight / total, p)
    classes = torch.multinomial(q, 1, generator=generator)
    return classes[:, 0], (p / q).gather(1, classes)[:, 0].sqrt().to(logits.dtype)


def _gaussian(mean: Tensor, generator: torch.Generator) -> Tensor:
    """Draw values of variance 1/2, of which the loss (y - mean)^2 is the negative log-likelihood."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return _finite(mean) + noise * 0.5**0.5


def _bernoulli(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw zeros and ones from logits."""
    return torch.bernoulli(_finite(logits).sigmoid(), generator=generator)


def _finite(outputs: Tensor) -> Tensor:
    if not outputs.isfinite().all():
        raise ValueError("the model's outputs, which labels are to be sampled from, contain NaN or inf")
    return outputs


def _categorical_hessian(logits: Tensor, v: Tensor) -> Tensor:
    """Multiply by diag(p) - p p^T, for classes in dimension 1."""
    p = logits.softmax(1)
    return p * (v - (p * v).sum(1, keepdim=True)) * (logits.shape[1] / logits.numel())


def _gaussian_hessian(mean: Tensor, v: Tensor) -> Tensor:
    return 2 * v / mean.numel()


def _bernoulli_hessian(logits: Tensor, v: Tensor) -> Tensor:
    p = logits.sigmoid()
    return p * (1 - p) * v / logits.numel()


def _categorical_divergence(logits: Tensor, others: Tensor, dim: int = 1) -> Tensor:
    p, q = logits.log_softmax(dim), others.log_softmax(dim)
    return (p.exp() * (p - q)).sum(dim)


def _gaussian_divergence(mean: Tensor, others: Tensor) -> Tensor:
    return (mean - others).square()  # of variance 1/2


def _bernoulli_divergence(logits: Tensor, others: Tensor) -> Tensor:
    as_classes = lambda z: torch.stack([z, torch.zeros_like(z)], 1)
    return _categorical_divergence(as_classes(logits), as_classes(others))


def _tokens_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.movedim(-1, 1), targets)


def _next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return _tokens_loss(logits[:, :-1], targets[:, 1:])


_tokens_divergence = functools.partial(_categorical_divergence, dim=-1)
LIKELIHOODS = {
    "categorical": NamedLikelihood(
        _categorical,
        nn.functional.cross_entropy,
        _categorical_hessian,
        _informative_classes,
        class_dim=1,
        divergence=_categorical_divergence,
    ),
    "tokens": NamedLikelihood(_tokens, _tokens_loss, class_dim=-1, divergence=_tokens_divergence),
    "next_token": NamedLikelihood(_tokens, _next_token_loss, class_dim=-1, shift=1, divergence=_tokens_divergence),
    "gaussian": NamedLikelihood(_gaussian, nn.functional.mse_loss, _gaussian_hessian, divergence=_gaussian_divergence),
    "bernoulli": NamedLikelihood(
        _bernoulli,
        nn.functional.binary_cross_entropy_with_logits,
        _bernoulli_hessian,
        divergence=_bernoulli_divergence,
    ),
}
