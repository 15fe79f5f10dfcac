"""The learned inverse Fisher matrix of FishLeg."""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from fishleg_ext.common.arguments import checked_count, checked_damping
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.curvature.base import Blocks, Curvature, CurvatureError, load_tensors, state_entry
from fishleg_ext.curvature.block import BlockFisher
from fishleg_ext.curvature.diagonal import DiagonalFisher
from fishleg_ext.curvature.fishleg_adam import Adam, AdamFactors
from fishleg_ext.curvature.kronecker import (
    Factors,
    KroneckerInverse,
    factor_bytes,
    inversion_bytes,
    matrix_shape,
)
from fishleg_ext.curvature.learned_factors import LEARNED_TENSORS, LearnedFactors
from fishleg_ext.observation.types import FisherProduct, Observation

STRUCTURES = ("rows", "kronecker", "block", "diagonal")
# Larger factors are not made unless asked for: one of 8,192 takes 256 MiB in float32.
LARGEST_FACTOR = 8192
Monitor = Callable[[str, int, float], None]


class FishLeg(KroneckerInverse):
    """The inverse Q of F + damping I itself, learned from gradients as the minimum of FishLeg's auxiliary loss.

    A(Q) = E_u[1/2 u^T Q (F + damping I) Q u - u^T Q u], u ~ N(0, I), is least where Q is the inverse. Garcia et al.,
    FishLeg, ICLR 2023; McGowan et al., FishLeg Surgeon, arXiv 2412.02328. The expectation over u is exact and takes no
    samples: A = 1/2 E_s|Q g_s|^2 + 1/2 damping |Q|_F^2 - tr Q, a problem of its own for each parameter. Within
    Q = P (x) M each batch of gradients improves both factors in closed form, by turns (see `LearnedFactors`): there is
    no step size to choose. Over blocks and over diagonal matrices the minimum is the inverse of F's own blocks.

    Structures of Q for a parameter [o, i] = [out, fan-in]:

    - "rows": diag(p) (x) M. Rows share M up to a factor and do not make up for each other, as in exact elimination,
      which compensates within a row: what that needs is the inverse of F's blocks.
    - "kronecker": P (x) M, as in the papers. Where rows can move together for nothing, as those of a softmax layer can,
      the loss is least for a P that turns to this direction, in which M tells little of a row's weights apart.
    - "block": blocks of block_size consecutive weights.
    - "diagonal".

    A layer's bias is one more column of its weight in the first two, where `biases` names it.

    With labels sampled from the model, the default, F is the true Fisher matrix.

    Args:
        damping: gamma, > 0, in the units of a squared gradient.
        passes: over the data, each of num_grads gradients, with labels of its own where these are sampled.
        batch_size: gradients from which P and M are improved once.
        structure: of all parameters, or a dict name -> structure of some. Else it is "rows" for matrices and
            convolutions with a fan-in of at most 8,192, and "block" for others.
        block_size: weights in a block, of "block".
        carry_over: how many gradients the last estimate counts for, at most, in the next one, which begins from it; 0
            forgets it, as does an estimate that max_memory splits.
        adam: descend the loss by Adam, as the papers do, instead of learning by turns: for comparison. Not with
            carry_over.
        monitor: called with (parameter, gradients of this estimate so far, auxiliary loss on the last of them before
            they were learned from; where an earlier estimate is carried over, its first loss is at the best scale of Q
            for them), such as a `LossCurves`.
    """

    default_num_grads: ClassVar[int] = 2048
    stores_factors: ClassVar[bool] = True

    def __init__(
        self,
        damping: float = 1e-6,
        passes: int = 1,
        batch_size: int = 64,
        structure: Union[str, Mapping[str, str], None] = None,
        block_size: int = 128,
        carry_over: int = 0,
        adam: Optional[Adam] = None,
        monitor: Optional[Monitor] = None,
    ) -> None:
        super().__init__()
        self.damping = checked_damping(damping, positive=True)
        self.passes = checked_count("passes", passes)
        self.batch_size = checked_count("batch_size", batch_size)
        self.block_size = checked_count("block_size", block_size)
        if isinstance(carry_over, bool) or not isinstance(carry_over, int) or carry_over < 0:
            raise ValueError(f"expected carry_over to be a number of gradients >= 0, got {carry_over!r}")
        if carry_over and adam is not None:
            raise ValueError(f"expected carry_over=0 with adam, got {carry_over}")
        self.carry_over = carry_over
        for wanted in structure.values() if isinstance(structure, Mapping) else [structure or "block"]:
            if wanted not in STRUCTURES:
                raise ValueError(f"expected structure to be one of {', '.join(STRUCTURES)}, got {wanted!r}")
        self.structure, self.adam, self.monitor = structure, adam, monitor
        self._learned: dict[str, LearnedFactors] = {}
        self._descended: dict[str, AdamFactors] = {}  # of those that are warmed up
        self._others: dict[str, Curvature] = {}  # of the parameters that are not Kronecker-factored

    @property
    def observes(self) -> frozenset[str]:  # type: ignore[override]
        """Gradients, and Fisher-vector products for those who descend by them."""
        together = self.adam is not None and self.adam.products == "gauss_newton"
        return frozenset({"gradients", "fisher_products"} if together else {"gradients"})

    @property
    def block_diagonal(self) -> bool:  # type: ignore[override]
        """Unless rows make up for each other."""
        given = self.structure.values() if isinstance(self.structure, Mapping) else [self.structure]
        return "kronecker" not in given

    def check(self, names: Collection[str]) -> None:
        """Structures are those of parameters that there are."""
        if isinstance(self.structure, Mapping) and (unknown := self.structure.keys() - set(names)):
            raise ValueError(
                f"structure names {', '.join(map(str, unknown))}, not among the parameters {', '.join(names)}"
            )

    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """That of the parameter's structure."""
        other = self._other(name, weight)
        return super().layout(name, weight) if other is None else other.layout(name, weight)

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Q = I / damping, or what was learned before."""
        super().start(weights)
        before = self._learned if self.carry_over else {}
        self._learned, self._descended, self._others = {}, {}, {}
        self._waiting: dict[str, list[Tensor]] = {}  # gradients that do not make up a batch yet
        for name, weight in weights.items():
            if (other := self._other(name, weight)) is not None:
                other.start({name: weight})
                self._others[name] = other
                continue
            apart = self._structure(name, weight) == "rows"
            fresh = LearnedFactors.start(self.damping, apart, self._like[name], *self._shape(name))
            last = before.get(name)
            if last is not None and (last.row.shape, last.col.shape) == (fresh.row.shape, fresh.col.shape):
                fresh.carry_over(last, self.carry_over)
            self._learned[name] = fresh
            self._waiting[name] = []

    def state_bytes(self, name: str, weight: Tensor, num_grads: int) -> int:
        """Two factors and their moments, and the gradients of a batch."""
        if (other := self._other(name, weight)) is not None:
            return other.state_bytes(name, weight, num_grads)
        shape, apart = self._matrix_shape(name, weight), self._structure(name, weight) == "rows"
        batch = self.batch_size * math.prod(shape) * widened(weight.dtype).itemsize
        factors = factor_bytes(shape, weight.dtype, apart)
        # Adam has a root, its gradient and two moments of each factor and of the scale.
        adam = 0 if self.adam is None else 4 * (factors + batch // self.batch_size)
        return 2 * factors + adam + batch

    def workspace_bytes(self, name: str, weight: Tensor, num_grads: int) -> int:
        """A batch four times over, and the inversion of the larger factor; with Adam what autograd holds as well."""
        if (other := self._other(name, weight)) is not None:
            return other.workspace_bytes(name, weight, num_grads)
        shape, apart = self._matrix_shape(name, weight), self._structure(name, weight) == "rows"
        batch = self.batch_size * math.prod(shape) * widened(weight.dtype).itemsize
        factors = factor_bytes(shape, weight.dtype, apart) + inversion_bytes(shape, apart)
        return (4 if self.adam is None else 8) * batch + factors

    def update(self, observation: Observation) -> None:
        """Learn from every batch_size gradients."""
        for name, other in self._others.items():
            other.update(Observation(observation.count, gradients={name: observation.gradients[name]}))
        for name in self._learned:
            grads, waiting = self._matrix(name, observation.gradients), self._waiting[name]
            while len(grads):
                room = self.batch_size - sum(map(len, waiting))
                # A copy: the observer's tensor may be written again before the batch is full.
                waiting.append(grads[:room].to(self._like[name].dtype, copy=True))
                grads = grads[room:]
                if sum(map(len, waiting)) == self.batch_size:
                    self._learn(name)
        if observation.fisher_product is not None and self._descended:
            self._descend_together(observation.fisher_product)

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Two products of matrices, or what the parameter's structure takes."""
        result = super().mul({name: x for name, x in v.items() if name not in self._others})
        for name, other in self._others.items():
            if name in v:
                result |= other.mul({name: v[name]})
        return result

    def diag(self) -> dict[str, Tensor]:
        """Of Q."""
        result = super().diag()
        for other in self._others.values():
            result |= other.diag()
        return result

    def blocks(self, name: str) -> Blocks:
        """Rows that share M, or the blocks of the parameter's structure."""
        return self._others[name].blocks(name) if name in self._others else super().blocks(name)

    def joint_cost(self, weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> float:
        """The sum over parameters."""
        total = super().joint_cost({name: w for name, w in weights.items() if name in self._learned}, pruned)
        for name, other in self._others.items():
            if name in weights:
                total += other.joint_cost({name: weights[name]}, {name: pruned[name]})
        return total

    def factors(self, name: str) -> Factors:
        """P and M as learned from all gradients so far."""
        if self._waiting[name]:
            self._learn(name)
        learned = self._descended[name] if name in self._descended else self._learned[name]
        return learned.factors()

    def state_dict(self) -> dict[str, Any]:
        """Factors, their moments and how many gradients went into them; with Adam its state, too."""
        for name in self._learned:
            self.factors(name)
        return {
            "learned": {
                name: {part: getattr(learned, part) for part in (*LEARNED_TENSORS, "seen", "carried")}
                for name, learned in self._learned.items()
            },
            "descended": {name: descended.state_dict() for name, descended in self._descended.items()},
            "others": {name: other.state_dict() for name, other in self._others.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        learned, descended, others = (state_entry(state, part) for part in ("learned", "descended", "others"))
        if descended and self.adam is None:
            raise ValueError("expected the state of FishLeg without adam, got one with it")
        for part in LEARNED_TENSORS:
            own = {name: getattr(mine, part) for name, mine in self._learned.items()}
            load_tensors(own, {name: state_entry(theirs, part) for name, theirs in learned.items()})
        for name, mine in self._learned.items():
            mine.seen, mine.carried = (int(learned[name][part]) for part in ("seen", "carried"))
        self._descended = {}
        self._waiting = {name: [] for name in self._learned}
        for name, theirs in descended.items():
            self._descended[name] = self._begin_descent(name)
            self._descended[name].load_state_dict(theirs)
        if others.keys() != self._others.keys():
            raise ValueError(f"expected curvature of {', '.join(self._others)}, got that of {', '.join(others)}")
        for name, other in self._others.items():
            other.load_state_dict(others[name])

    def _learn(self, name: str) -> None:
        """From the gradients that wait."""
        grads, learned = torch.cat(self._waiting[name]), self._learned[name]
        self._waiting[name].clear()
        if self.adam is None or learned.seen < self.adam.warm_up:
            loss = learned.learn(grads, functools.partial(self.invert, name))
        else:
            if name not in self._descended:
                self._descended[name] = self._begin_descent(name)
            learned.seen += len(grads)
            loss = self._descended[name].learn(grads)
            if not loss.isfinite():
                raise CurvatureError(f"{name}: Adam's loss is not finite; use more damping or a smaller learning_rate")
        if self.monitor is not None:
            self.monitor(name, learned.seen - learned.carried, float(loss))

    def _begin_descent(self, name: str) -> AdamFactors:
        assert self.adam is not None
        seed = list(self.layouts).index(name)
        return AdamFactors(self.adam, self.damping, self._learned[name].factors(), seed)

    def _descend_together(self, fisher_product: FisherProduct) -> None:
        """A step of all parameters that are warmed up, with probes through the whole network."""
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

    def _structure(self, name: str, weight: Tensor) -> str:
        given = self.structure.get(name) if isinstance(self.structure, Mapping) else self.structure
        fits = weight.dim() > 1 and matrix_shape(weight)[1] <= LARGEST_FACTOR
        return given or ("rows" if fits else "block")

    def _other(self, name: str, weight: Tensor) -> Optional[Curvature]:
        """A model of this parameter alone, unless it has factors."""
        structure = self._structure(name, weight)
        if structure == "diagonal":
            return DiagonalFisher(self.damping)
        return BlockFisher(self.block_size, self.damping) if structure == "block" else None
