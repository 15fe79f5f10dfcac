"""Says what every curvature model can do: a recipe holds settings, an estimate what was observed under them."""

import contextlib
import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from fishleg_ext import ops
from fishleg_ext.common.arguments import checked_count, one_of
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.settings import Settings, setting
from fishleg_ext.common.state import state_entry
from fishleg_ext.common.waiting import read
from fishleg_ext.observation.likelihoods import Likelihood, checked_likelihood
from fishleg_ext.observation.types import Observation


class CurvatureError(RuntimeError):
    """A curvature model cannot be inverted; the message names the parameter."""


class Blocks(NamedTuple):
    """The inverse of one parameter as exact elimination needs it: scale * inverse * scale, block by block.

    A layer's bias is one more weight of each of its rows, the last, that is compensated with the others and never
    pruned.

    Attributes:
        inverse: [K or 1, B, B], or [K or 1, B + 1, B + 1] with the bias.
        weight_scale: [K, B] or [K, B + 1]; weights are divided by it before elimination, multiplied after. None is 1.
        cost_scale: [K, 1]; costs are multiplied by it. None is 1.
    """

    inverse: Tensor
    weight_scale: Tensor | None = None
    cost_scale: Tensor | None = None

    def rows(self, weight: Tensor, bias: Tensor | None, *masks: Tensor) -> list[Tensor]:
        """Weights [K, B] in the units of the inverse, with the bias [K] where the inverse has it; and masks [K, B].

        The bias is in no mask. Both are in the wider dtype of the two.
        """
        if self.inverse.shape[2] > weight.shape[1]:
            assert bias is not None
            weight = torch.cat([weight, bias[:, None]], dim=1)
            masks = tuple(torch.nn.functional.pad(mask, (0, 1)) for mask in masks)
        return [self.scaled(weight), *masks]

    def scaled(self, weight: Tensor) -> Tensor:
        """Weights [K, B], or with the bias [K, B + 1], in the units of the inverse; 0 where the scale is 0."""
        if self.weight_scale is None:
            return weight
        scale = self.weight_scale[:, : weight.shape[1]]
        return torch.where(scale != 0, weight / scale, 0)

    def unscaled(self, weight: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return weight if self.weight_scale is None else weight * self.weight_scale[:, : weight.shape[1]]


@dataclass(frozen=True, kw_only=True)
class Curvature(Settings, ABC):
    """A recipe: the settings of a model of the Fisher matrix F. Frozen, hashable and comparable; it holds no state.

    `start` begins an `Estimate` of some weights under these settings, which holds all that is observed.

    Args:
        num_grads: gradients an estimate is made from; None is `default_num_grads`.
        grad_batch_size: samples whose mean loss each gradient is of; None is 1.
        labels: "data" (empirical Fisher matrix) or "model" (targets sampled from the likelihood, true Fisher matrix);
            None is `default_labels`.
        likelihood: of labels="model": "categorical", "gaussian", "bernoulli" or (outputs, generator) -> targets; may be
            None with cross_entropy.

    Attributes:
        name: what `prune(curvature=...)` calls it; empty where it has no name.
        observes: what `Estimate.update` needs: {"gradients"}, {"gradients", "fisher_products"}, or any of "inputs" and
            "output_gradients"; empty where it needs nothing.
        block_diagonal: whether F has no entries between the blocks of `Estimate.blocks`, so that their costs add up.
        per_parameter: whether each parameter can be estimated without the others.
        conditions_on_masks: whether an estimate is of the weights kept at the time, as masked gradients make it. Else
            gradients are not masked, the inverse is that of all weights, and elimination must deal with the pruned
            first.
        supports_mask: whether, where an estimate does not condition on masks, rows and columns of the pruned may be
            cleared from its inverse for single-weight scores, as FishLeg masks its scale.
        takes_biases: whether a layer's bias can be modelled together with its weight.
        default_saliency, default_scope, default_labels, default_num_grads: what `prune` does unless told otherwise.
    """

    num_grads: int | None = setting(None, checked_count)
    grad_batch_size: int | None = setting(None, checked_count)
    labels: str | None = setting(None, one_of("data", "model"))
    likelihood: Likelihood | None = setting(None, checked_likelihood)

    name: ClassVar[str] = ""
    observes: ClassVar[frozenset[str]] = frozenset({"gradients"})
    block_diagonal: ClassVar[bool] = True
    per_parameter: ClassVar[bool] = True
    conditions_on_masks: ClassVar[bool] = True
    supports_mask: ClassVar[bool] = False
    takes_biases: ClassVar[bool] = False
    default_saliency: ClassVar[str] = "exact"
    default_scope: ClassVar[str] = "global"
    default_labels: ClassVar[str] = "data"
    default_num_grads: ClassVar[int] = 1024

    def __post_init__(self) -> None:
        """Check every setting, and that the model has a use for it."""
        super().__post_init__()
        for name in ("labels", "likelihood"):
            if getattr(self, name) is not None and not self.observes - {"inputs"}:
                what = "layer inputs alone" if self.observes else "nothing"
                raise ValueError(f"{type(self).__name__} takes no {name}: it observes {what}")

    def recorded(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return what stands for a gradient of each parameter and needs no data, in its shape; empty of most models."""
        return {}

    @property
    def sequential(self) -> bool:
        """Tell whether parameters are estimated and pruned one after the other."""
        return False

    @property
    def dense_inputs(self) -> bool:
        """Tell whether, block by block, each has the inputs that the blocks before gave it before they were pruned."""
        return False

    @property
    def num_passes(self) -> int:
        """Tell how often an estimate observes the same data, with other labels each time where these are sampled."""
        return 1

    @property
    def prior_weight(self) -> int:
        """Tell as how many gradients an estimate counts in the next one, which starts from it; 0 starts anew."""
        return 0

    @property
    def uses_likelihood(self) -> bool:
        """Tell whether labels are sampled, or products with the Fisher matrix computed, by the likelihood."""
        samples = (self.labels or self.default_labels) == "model" and self.observes - {"inputs"}
        return bool(samples) or "fisher_products" in self.observes

    def with_schedule(self) -> Self:
        """Fill in the settings whose default is another where a schedule prunes again and again."""
        return self

    def with_saliency(self, saliency: str | None) -> Self:
        """Fill in the settings whose default is another for a saliency; None is the model's own."""
        return self

    def with_settings(self, **given: Any) -> Self:
        """Fill in settings that are None.

        Raises:
            ValueError: a setting is there already and another is given.
        """
        for name, value in given.items():
            own = getattr(self, name)
            if own is not None and own != value:
                raise ValueError(f"{name}={value!r} cannot be combined with {type(self).__name__}({name}={own!r})")
        return dataclasses.replace(self, **given)

    def check(self, names: Collection[str]) -> None:
        """Raise ValueError where settings do not fit these parameters, which are all that `start` will ever name."""

    @abstractmethod
    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """Say how `Estimate.blocks` cuts a parameter."""

    @abstractmethod
    def start(
        self,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, str] | None = None,
        *,
        previous: "Estimate[Any] | None" = None,
        progress: bool = False,
    ) -> "Estimate[Any]":
        """Begin an estimate of these weights.

        Args:
            weights: name -> tensor; of the values nothing is kept.
            biases: name of a weight -> name of its layer's bias, where there is one. These biases are compensated with
                the weights and never pruned; `update` and `mul` take them by name, beside the weights, and `mul`
                returns them. Models that take no biases ignore it.
            previous: an estimate of the same recipe, to start from where `prior_weight` is not 0.
            progress: whether to show progress bars.
        """

    @abstractmethod
    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Bytes held for this weight, and its bias if there is one, while observations stream in."""

    def workspace_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Peak temporary bytes of `update` and `blocks` for this weight, beyond its state."""
        return 2 * self.state_bytes(name, weight, num_grads, has_bias)


Recipe = TypeVar("Recipe", bound=Curvature)
Kept = TypeVar("Kept", bound=tuple[Any, ...])

# Where a parameter has many inverses, a CPU computes so many bytes of them at a time: these stay in a cache, and the
# next take the same memory.
CACHE_BYTES = 2**23


class Estimate(ABC, Generic[Recipe]):
    """Holds what was observed of some weights under a recipe, and answers for F and its inverse.

    `update` takes in observations, the rest is then answered for the weights that it was started for. Tensors go by
    parameter name and have the parameter's shape, its outputs first (`common.orientation`).

    Attributes:
        recipe: the settings.
        biases: name of a weight -> name of the bias that is modelled with it.
        layouts: name of a weight -> how `blocks` cuts it.
        damping_raised: name of a weight -> number of blocks whose damping had to be raised to invert them.
        keep_bytes: memory for inverses that are needed again, for scores first and then for compensation; the others
            are computed twice.
        progress: whether to show progress bars.
    """

    def __init__(
        self,
        recipe: Recipe,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, str] | None = None,
        *,
        previous: "Estimate[Any] | None" = None,
        progress: bool = False,
    ) -> None:
        self.recipe = recipe
        self.progress = progress
        self.biases = {n: b for n, b in (biases or {}).items() if n in weights} if recipe.takes_biases else {}
        self.layouts = {name: recipe.layout(name, weight) for name, weight in weights.items()}
        self.damping_raised: dict[str, int] = {}
        self.keep_bytes = 0
        self._kept: dict[str, tuple[Any, ...]] = {}
        self._unchecked: list[_Inverted] | None = None

    @property
    def observes(self) -> frozenset[str]:
        """Tell what `update` needs; see `Curvature`."""
        return self.recipe.observes

    @abstractmethod
    def update(self, observation: Observation) -> None:
        """Take in one observation."""

    @abstractmethod
    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return F^-1 v."""

    @abstractmethod
    def diag(self) -> dict[str, Tensor]:
        """Return the diagonal of F^-1."""

    def fisher_diag(self) -> dict[str, Tensor]:
        """Return the diagonal of F itself, damping included: what a weight costs for which no other compensates.

        A model that does not override this inverts each of its `blocks`.

        Raises:
            CurvatureError: a block cannot be inverted.
        """
        result = {}
        for name, layout in self.layouts.items():
            rows = [self._fisher_diag_of(name, blocks) for _, blocks in self.blocks_at_a_time(name)]
            result[name] = layout.from_blocks(torch.cat(rows).expand(layout.num_blocks, -1))
        return result

    @abstractmethod
    def blocks(self, name: str) -> Blocks:
        """Compute the diagonal blocks of F^-1 for one parameter, cut as `layouts[name]` says."""

    def blocks_at_a_time(self, name: str) -> Iterator[tuple[slice, Blocks]]:
        """Yield what `blocks` returns, some of the K blocks at a time where that is faster, and which these are."""
        yield slice(None), self.blocks(name)

    def factored_blocks(self, name: str) -> Blocks:
        """Return what `blocks` does, but for upper triangular U, U^T U = inverse, in the place of the inverse.

        Raises:
            CurvatureError: an inverse is not positive definite.
        """
        blocks = self.blocks(name)
        factor, failed = torch.linalg.cholesky_ex(blocks.inverse.double())
        self._check_factored(name, failed == 0)
        return blocks._replace(inverse=factor.mT.to(blocks.inverse.dtype))

    @abstractmethod
    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        """Return the loss increase of moving weights, and biases that are modelled with them, by dw: 1/2 dw^T F dw."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was observed, as tensors and numbers. Models without state have none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned for an estimate of the same weights; ValueError if it does not fit them."""
        if state:
            raise ValueError(f"{type(self.recipe).__name__} keeps no state, got {sorted(state)}")

    def merge(self, other: "Estimate[Any]") -> None:
        """Add what another estimate of the same recipe has observed of the same weights, as if this one had.

        Raises:
            ValueError: the other is of another recipe or of other weights.
            NotImplementedError: the model cannot tell what an estimate from all observations would be.
        """
        if not isinstance(other, Estimate):
            raise TypeError(f"expected an estimate, got {other!r:.200}")
        if other.recipe != self.recipe:
            raise ValueError(f"expected an estimate of {self.recipe}, got one of {other.recipe}")
        if other.layouts != self.layouts or other.biases != self.biases:
            raise ValueError(f"expected an estimate of {self._weights()}, got one of {other._weights()}")
        self._merge(other)

    @abstractmethod
    def _merge(self, other: Any) -> None:
        """Add the sums of another estimate that fits."""

    def _keeping(self, name: str, invert: Callable[[], Kept]) -> Kept:
        """Return inverses of one parameter, kept from the last time or, if there is room, for the next."""
        if name not in self._kept:
            inverses = invert()
            size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors if x is not None)
            if sum(map(size, self._kept.values())) + size(inverses) > self.keep_bytes:
                return inverses
            self._kept[name] = inverses
        return self._kept[name]  # type: ignore[return-value]

    def forget_kept(self) -> None:
        """Free the memory of inverses that were kept."""
        self._kept.clear()

    def _fisher_diag_of(self, name: str, blocks: Blocks) -> Tensor:
        """Return the diagonal of F as some blocks of one parameter have it, [K or 1, B]."""
        inverse, size = blocks.inverse, self.layouts[name].block_size
        if inverse.shape[2] == 1:
            diagonal = 1 / inverse[:, 0]
        else:
            fisher, info = ops.block_inverse(inverse.double(), 0.0)
            self._check_inverted(name, info, 0.0, "blocks of the inverse")
            diagonal = fisher.diagonal(dim1=1, dim2=2)[:, :size]
        if blocks.weight_scale is not None:
            diagonal = diagonal / blocks.weight_scale[:, :size].square()
        if blocks.cost_scale is not None:
            diagonal = diagonal * blocks.cost_scale
        return diagonal.to(inverse.dtype)

    def _weights(self) -> str:
        return ", ".join(f"{name} {list(layout.shape)}" for name, layout in self.layouts.items())

    def _check_factored(self, name: str, factored: Tensor) -> None:
        if not factored.all():
            raise CurvatureError(f"{name}: the inverse is not positive definite to rounding; use more damping")

    @contextlib.contextmanager
    def checking_later(self) -> Iterator[None]:
        """Look at the end at what all inversions of this block say, so that a GPU is waited for once.

        Raises:
            CurvatureError: a matrix had no inverse; what was computed from it is NaN.
        """
        pending: list[_Inverted] = []
        self._unchecked = pending
        try:
            yield
        finally:
            self._unchecked = None
        self._look(pending)

    def _check_inverted(self, name: str, info: Tensor, damping: float, what: str, *, to_rounding: bool = False) -> None:
        """Note where damping was raised, with a warning; CurvatureError where a matrix has no inverse all the same.

        Args:
            name: of the parameter.
            info: as of `ops.block_inverse`.
            damping: that was asked for.
            what: was inverted, in the plural.
            to_rounding: damping was not raised tenfold again and again, but to what rounding may have left.
        """
        if info.numel():
            inverted = _Inverted(name, info, damping, what, to_rounding)
            (self._look if self._unchecked is None else self._unchecked.extend)([inverted])

    def _look(self, inverted: "list[_Inverted]") -> None:
        numbers = (
            count for each in inverted for count in ((each.info < 0).sum(), (each.info > 0).sum(), each.info.max())
        )
        counts = list(map(int, read(numbers)))
        for i, each in enumerate(inverted):
            if counts[3 * i]:
                self._kept.pop(each.name, None)
        for i, (name, info, damping, what, to_rounding) in enumerate(inverted):
            failed, raised, most = counts[3 * i : 3 * i + 3]
            if failed:
                how = "to what rounding may have left" if to_rounding else "twelve times"
                raise CurvatureError(
                    f"{name}: {failed} of {len(info)} {what} cannot be inverted, even with damping raised from "
                    f"{damping:g} {how}; use a larger damping, or more gradients"
                )
            if raised and name not in self.damping_raised:
                self.damping_raised[name] = raised
                if to_rounding:
                    how = f"damping {damping:g} is less than rounding may have left in {what}; it was raised to that"
                else:
                    which = f"{raised} of {len(info)} {what} are not positive definite with damping {damping:g}"
                    how = f"{which}; it was raised tenfold up to {most} times for these"
                warnings.warn(f"{name}: {how}", stacklevel=3)


class _Inverted(NamedTuple):
    """Holds what one inversion tells of a parameter."""

    name: str
    info: Tensor
    damping: float
    what: str
    to_rounding: bool


def curvature_entry(state: Mapping[str, Any], key: str) -> Any:
    """Return an entry of a saved estimate, or raise ValueError if it is that of another model."""
    return state_entry(state, key, "a curvature model")


def load_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy a saved tensor into each own one; ValueError where names or shapes differ."""
    check_names(own, state)
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"expected curvature of {name} of shape {list(tensor.shape)}, got {list(state[name].shape)}"
            )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def check_names(own: Collection[str], state: Collection[str]) -> None:
    """Raise ValueError unless a saved state is of the same parameters."""
    if set(own) != set(state):
        raise ValueError(f"expected curvature of {', '.join(own)}, got that of {', '.join(state)}")
