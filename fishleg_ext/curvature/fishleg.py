"""The learned inverse Fisher matrix of FishLeg."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fishleg_ext.common.arguments import checked_count, checked_integer, checked_positive, checked_type
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.settings import setting
from fishleg_ext.curvature.base import Blocks, CurvatureError, Estimate, check_names, curvature_entry, load_tensors
from fishleg_ext.curvature.block import BlockFisher
from fishleg_ext.curvature.diagonal import DiagonalFisher
from fishleg_ext.curvature.fishleg_adam import Adam, AdamFactors
from fishleg_ext.curvature.kronecker import (
    Factors,
    KroneckerCurvature,
    KroneckerEstimate,
    factor_bytes,
    inversion_bytes,
    matrix_shape,
)
from fishleg_ext.curvature.learned_factors import (
    LEARNED_TENSORS,
    DenseGradients,
    Directions,
    Gradients,
    LearnedFactors,
    gradients_of,
)
from fishleg_ext.observation.types import FisherProduct, Observation

COUNTS = ("seen", "carried", "inverted")
STRUCTURES = ("rows", "kronecker", "block", "diagonal")
# Larger factors are not made unless asked for: one of 8,192 takes 256 MiB in float32.
LARGEST_FACTOR = 8192
Monitor = Callable[[str, int, float], None]


def _checked_structure(name: str, value: Any) -> str | tuple[tuple[str, str], ...]:
    """Return one structure, or a tuple of (parameter, structure) made from a mapping or from such pairs."""
    if isinstance(value, str):
        given: Any = value
        structures = [value]
    else:
        try:
            given = tuple((str(parameter), structure) for parameter, structure in dict(value).items())
        except (TypeError, ValueError):
            raise ValueError(f"expected {name} to be a structure or a dict of structures, got {value!r}") from None
        structures = [structure for _, structure in given]
    for structure in structures:
        if structure not in STRUCTURES:
            raise ValueError(f"expected {name} to be one of {', '.join(STRUCTURES)}, got {structure!r}")
    return given


def _checked_adam(name: str, value: Any) -> Adam:
    return checked_type(name, value, Adam, "an Adam")


@dataclass(frozen=True)
class FishLeg(KroneckerCurvature):
    """The inverse Q of F + damping I itself, learned from gradients as the minimum of FishLeg's auxiliary loss.

    A(Q) = E_u[1/2 u^T Q (F + damping I) Q u - u^T Q u], u ~ N(0, I), is least where Q is the inverse. Garcia et al.,
    FishLeg, ICLR 2023; McGowan et al., FishLeg Surgeon, arXiv 2412.02328. The expectation over u is exact and takes no
    samples: A = 1/2 E_s|Q g_s|^2 + 1/2 damping |Q|_F^2 - tr Q, a problem of its own for each parameter. Within
    Q = P (x) M each batch of gradients updates one factor, then the other, in closed form (see `LearnedFactors`): there
    is no step size to choose. Over blocks and over diagonal matrices the minimum is the inverse of F's own blocks.

    Structures of Q for a parameter [o, i] = [out, fan-in]:

    - "rows": diag(p) (x) M, a diagonal row factor. Rows share M up to a factor and do not compensate for each other, as
      in exact elimination, which compensates within a row: what that needs is the inverse of F's blocks.
    - "kronecker": P (x) M, as in the papers. Where rows can move together for nothing, as those of a softmax layer can,
      the loss is least for a P that turns to this direction, in which M tells little of a row's weights apart.
    - "block": blocks of block_size consecutive weights.
    - "diagonal".

    A layer's bias is one more column of its weight in the first two.

    With labels sampled from the model, the default, F is the true Fisher matrix.

    Args:
        damping: gamma, > 0, in the units of a squared gradient.
        passes: over the data, each of num_grads gradients, with labels of its own where these are sampled.
        batch_size: gradients from which P and M are updated once.
        structure: of all parameters, or name -> structure of some, kept as a tuple of pairs. Else it is "rows" for
            matrices and convolutions with a fan-in of at most 8,192, and "block" for others.
        block_size: weights in a block, of "block".
        carry_over: prior weight, in gradients, of the previous estimate; 0 estimates from scratch, as does an estimate
            that max_memory splits. None is 0, but 2,048 for `curvature=` with a schedule (0 with `adam`).
        adam: descend the loss by Adam, as the papers do, instead of alternating closed-form updates: for comparison.
            Not with carry_over.
        monitor: called with (parameter, gradients of this estimate so far, auxiliary loss on the last of them before
            they were learned from; after a warm start the first loss is at the best scale of Q for them), such as a
            `LossCurves`. Recipes are compared without it.
    """

    damping: float = setting(1e-6, checked_positive)
    passes: int = setting(1, checked_count)
    batch_size: int = setting(64, checked_count)
    structure: str | Mapping[str, str] | tuple[tuple[str, str], ...] | None = setting(None, _checked_structure)
    block_size: int = setting(128, checked_count)
    carry_over: int | None = setting(None, checked_integer)
    adam: Adam | None = setting(None, _checked_adam)
    monitor: Monitor | None = setting(None, compare=False)

    name: ClassVar[str] = "fishleg"
    default_num_grads: ClassVar[int] = 2048

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if self.carry_over and self.adam is not None:
            raise ValueError(
                f"carry_over={self.carry_over} cannot be combined with adam: Adam's roots have no warm start"
            )

    @property
    @override
    def observes(self) -> frozenset[str]:  # type: ignore[override]
        together = self.adam is not None and self.adam.products == "gauss_newton"
        return frozenset({"gradients", "fisher_products"} if together else {"gradients"})

    @property
    @override
    def block_diagonal(self) -> bool:  # type: ignore[override]
        given = self.structures
        return "kronecker" not in (given.values() if given else [self.structure])

    @property
    @override
    def num_passes(self) -> int:
        return self.passes

    @property
    @override
    def prior_weight(self) -> int:
        return self.carry_over or 0

    @property
    def structures(self) -> dict[str, str]:
        """Name -> structure of those parameters that have one of their own."""
        return dict(self.structure) if isinstance(self.structure, tuple) else {}

    @override
    def with_schedule(self) -> "FishLeg":
        if self.carry_over is not None or self.adam is not None:
            return self
        return dataclasses.replace(self, carry_over=self.default_num_grads)

    def check(self, names: Collection[str]) -> None:
        """Raise ValueError where `structure` names parameters that there are not."""
        if unknown := self.structures.keys() - set(names):
            raise ValueError(
                f"structure names {', '.join(map(str, unknown))}, not among the parameters {', '.join(names)}"
            )

    @override
    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        other = self.other(name, weight)
        return super().layout(name, weight) if other is None else other.layout(name, weight)

    @override
    def start(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, str] | None = None, **options: Any
    ) -> "FishLegEstimate":
        return FishLegEstimate(self, weights, biases, **options)

    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Count two factors and their moments, and the gradients of a batch."""
        if (other := self.other(name, weight)) is not None:
            return other.state_bytes(name, weight, num_grads)
        shape, diagonal_rows = matrix_shape(weight, has_bias), self.structure_of(name, weight) == "rows"
        batch = self.batch_size * math.prod(shape) * widened(weight.dtype).itemsize
        factors = factor_bytes(shape, weight.dtype, diagonal_rows)
        # Adam has a root, its gradient and two moments of each factor and of the scale.
        adam = 0 if self.adam is None else 4 * (factors + batch // self.batch_size)
        return 2 * factors + adam + batch

    def workspace_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Count a batch four times, and the inversion of the larger factor; with Adam what autograd holds as well."""
        if (other := self.other(name, weight)) is not None:
            return other.workspace_bytes(name, weight, num_grads)
        shape, diagonal_rows = matrix_shape(weight, has_bias), self.structure_of(name, weight) == "rows"
        batch = self.batch_size * math.prod(shape) * widened(weight.dtype).itemsize
        factors = factor_bytes(shape, weight.dtype, diagonal_rows) + inversion_bytes(shape, diagonal_rows)
        return (4 if self.adam is None else 8) * batch + factors

    def structure_of(self, name: str, weight: Tensor) -> str:
        """Structure of Q for one parameter."""
        given = self.structure if isinstance(self.structure, str) else self.structures.get(name)
        fits = weight.dim() > 1 and matrix_shape(weight)[1] <= LARGEST_FACTOR
        return given or ("rows" if fits else "block")

    def other(self, name: str, weight: Tensor) -> DiagonalFisher | BlockFisher | None:
        """Recipe of a parameter without Kronecker factors, None where it has them."""
        structure = self.structure_of(name, weight)
        if structure == "diagonal":
            return DiagonalFisher(self.damping)
        return BlockFisher(self.block_size, self.damping) if structure == "block" else None


class FishLegEstimate(KroneckerEstimate[FishLeg]):
    """The factors that were learned, and gradients that do not make up a batch yet."""

    stores_factors: ClassVar[bool] = True

    def __init__(
        self,
        recipe: FishLeg,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, str] | None = None,
        *,
        previous: Estimate[Any] | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__(recipe, weights, biases, progress=progress)
        before = previous._learned if isinstance(previous, FishLegEstimate) and recipe.prior_weight else {}
        self._learned: dict[str, LearnedFactors] = {}
        self._descended: dict[str, AdamFactors] = {}  # of those that are warmed up
        self._others: dict[str, Estimate[Any]] = {}  # of the parameters that are not Kronecker-factored
        self._waiting: dict[str, list[Gradients]] = {}  # gradients that do not make up a batch yet
        directions = Directions()
        for name, weight in weights.items():
            if (other := recipe.other(name, weight)) is not None:
                self._others[name] = other.start({name: weight})
                self._others[name].damping_raised = self.damping_raised
                continue
            diagonal_rows = recipe.structure_of(name, weight) == "rows"
            fresh = LearnedFactors.start(recipe.damping, diagonal_rows, self._like[name], *self._shape(name))
            fresh.directions = directions
            last = before.get(name)
            if last is not None and (last.row.shape, last.col.shape) == (fresh.row.shape, fresh.col.shape):
                fresh.warm_start(last, recipe.prior_weight)
            self._learned[name] = fresh
            self._waiting[name] = []

    @override
    def update(self, observation: Observation) -> None:
        for name, other in self._others.items():
            other.update(Observation(observation.count, gradients={name: observation.gradients[name]}))
        for name, waiting in self._waiting.items():
            for grads in self._parts_of(name, observation):
                waiting.append(grads)
                if sum(map(len, waiting)) == self.recipe.batch_size:
                    self._learn(name)
        if observation.fisher_product is not None and self._descended:
            self._descend_together(observation.fisher_product)

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return Q v."""
        result = super().mul({name: x for name, x in v.items() if name not in self._others})
        for name, other in self._others.items():
            if name in v:
                result |= other.mul({name: v[name]})
        return result

    def diag(self) -> dict[str, Tensor]:
        """Return the diagonal of Q."""
        result = super().diag()
        for other in self._others.values():
            result |= other.diag()
        return result

    @override
    def fisher_diag(self) -> dict[str, Tensor]:
        result = super().fisher_diag()
        for other in self._others.values():
            result |= other.fisher_diag()
        return result

    def blocks(self, name: str) -> Blocks:
        """Return M for all rows, or the blocks of the parameter's structure."""
        return self._others[name].blocks(name) if name in self._others else super().blocks(name)

    @override
    def blocks_at_a_time(self, name: str) -> Iterator[tuple[slice, Blocks]]:
        return self._others[name].blocks_at_a_time(name) if name in self._others else super().blocks_at_a_time(name)

    @override
    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        total = super().step_cost({name: dw for name, dw in step.items() if name not in self._others})
        for name, other in self._others.items():
            if name in step:
                total += other.step_cost({name: step[name]})
        return total

    def factors(self, name: str) -> Factors:
        """Return P and M as learned from all gradients so far.

        Raises:
            CurvatureError: a moment of the gradients has no inverse.
        """
        if self._waiting[name]:
            self._learn(name)
        if name in self._descended:
            return self._descended[name].factors()
        learned = self._learned[name]
        factors = learned.factors()
        info = torch.where(torch.as_tensor(learned.failed) != 0, -1, torch.as_tensor(learned.raised))
        damping = self.recipe.damping
        self._check_inverted(name, info.reshape(1), damping, "Kronecker factors", to_rounding=True)
        return factors

    @contextlib.contextmanager
    def checking_later(self) -> Iterator[None]:
        """Look at the end at what all inversions of this block say, those of other structures as well."""
        with contextlib.ExitStack() as stack:
            for other in self._others.values():
                stack.enter_context(other.checking_later())
            stack.enter_context(super().checking_later())
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return factors, their moments and how many gradients went into them; with Adam its state, too."""
        for name in self._learned:
            self.factors(name)
        return {
            "learned": {
                name: {part: getattr(learned, part) for part in (*LEARNED_TENSORS, *COUNTS)}
                for name, learned in self._learned.items()
            },
            "descended": {name: descended.state_dict() for name, descended in self._descended.items()},
            "others": {name: other.state_dict() for name, other in self._others.items()},
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        learned, descended, others = (curvature_entry(state, part) for part in ("learned", "descended", "others"))
        if descended and self.recipe.adam is None:
            raise ValueError("expected the state of FishLeg without adam, got one with it")
        for part in LEARNED_TENSORS:
            own = {name: getattr(mine, part) for name, mine in self._learned.items()}
            load_tensors(own, {name: curvature_entry(theirs, part) for name, theirs in learned.items()})
        for name, mine in self._learned.items():
            mine.seen, mine.carried = (int(learned[name][part]) for part in COUNTS[:2])
            mine.inverted = int(learned[name].get("inverted", mine.seen))  # which states of 0.1 do not have
        self._descended = {}
        self._waiting = {name: [] for name in self._learned}
        for name, theirs in descended.items():
            self._descended[name] = self._begin_descent(name)
            self._descended[name].load_state_dict(theirs)
        check_names(self._others, others)
        for name, other in self._others.items():
            other.load_state_dict(others[name])

    @override
    def _merge(self, other: "FishLegEstimate") -> None:
        raise NotImplementedError(
            "estimates of FishLeg cannot be merged: each batch was weighted by the inverse that its own estimate had "
            "learned by then; estimate one from all of the data"
        )

    def _parts_of(self, name: str, observation: Observation) -> Iterator[Gradients]:
        """Yield the gradients of one parameter, cut where a batch ends; in factors where these are less work."""
        bias = self.biases[name] if self._has_bias(name) else None
        form = "least work" if self.recipe.adam is None else "dense"
        grads = gradients_of(observation, name, bias, self._like[name].dtype, form=form)
        for part in self._cut(name, len(grads)):
            # What waits is a copy: the observer's tensor may be written again before the batch is full.
            yield grads.part(part, copy=part.stop - part.start < self.recipe.batch_size)

    def _cut(self, name: str, count: int) -> Iterator[slice]:
        """Yield parts of so many gradients, the first as long as the batch that waits has room."""
        start = 0
        while start < count:
            room = self.recipe.batch_size - sum(map(len, self._waiting[name]))
            yield slice(start, min(start + room, count))
            start += room

    def _learn(self, name: str) -> None:
        """Learn from the gradients that wait."""
        grads, learned = list(self._waiting[name]), self._learned[name]
        self._waiting[name].clear()
        if self.recipe.adam is None or learned.seen < self.recipe.adam.warm_up:
            loss = learned.learn(grads, monitored=self.recipe.monitor is not None)
        else:
            if name not in self._descended:
                self._descended[name] = self._begin_descent(name)
            values = torch.cat([part.values for part in grads if isinstance(part, DenseGradients)])
            learned.seen += len(values)
            loss = self._descended[name].learn(DenseGradients(values))
            if not loss.isfinite():
                raise CurvatureError(f"{name}: Adam's loss is not finite; use more damping or a smaller learning_rate")
        if self.recipe.monitor is not None and loss is not None:
            self.recipe.monitor(name, learned.seen - learned.carried, float(loss))

    def _begin_descent(self, name: str) -> AdamFactors:
        assert self.recipe.adam is not None
        seed = list(self.layouts).index(name)
        return AdamFactors(self.recipe.adam, self.recipe.damping, self._learned[name].factors(), seed)

    def _descend_together(self, fisher_product: FisherProduct) -> None:
        """Take a step with all parameters that are warmed up, with probes through the whole network."""
        probes = {name: descended.probe() for name, descended in self._descended.items()}
        products = [
            fisher_product(dict(part for name, (_, v) in probes.items() for part in self._parts(name, v[i])))
            for i in range(len(next(iter(probes.values()))[0]))
        ]
        for name, (u, v) in probes.items():
            fisher_v = torch.stack([self._matrix(name, product) for product in products])
            self._descended[name].follow(u, v, fisher_v)

    def _factored(self) -> list[str]:
        return list(self._learned)

    def _has_bias(self, name: str) -> bool:
        return super()._has_bias(name) and name not in self._others
