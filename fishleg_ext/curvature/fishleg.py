"""The learned inverse Fisher matrix of FishLeg."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.arguments import checked_count, checked_damping
from fishleg_ext.curvature.base import Blocks, Curvature, load_tensors, state_entry
from fishleg_ext.curvature.block import BlockFisher
from fishleg_ext.curvature.diagonal import DiagonalFisher
from fishleg_ext.curvature.kronecker import Factors, KroneckerInverse, factor_bytes, matrix_shape
from fishleg_ext.dtypes import widened
from fishleg_ext.layout import BlockLayout
from fishleg_ext.observe import Observation

STRUCTURES = ("rows", "kronecker", "block", "diagonal")
# Larger factors are not made unless asked for: one of 8,192 takes 256 MiB in float32.
LARGEST_FACTOR = 8192
LEARNED_TENSORS = ("row", "col", "row_moment", "col_moment", "trace")
Monitor = Callable[[str, int, float], None]


@dataclass
class LearnedFactors:
    """Q = P (x) M of one parameter [o, i], learned from batches of gradients G by turns.

    The auxiliary loss A(Q) = 1/2 E|Q g|^2 + 1/2 damping |Q|_F^2 - tr Q is quadratic in each factor, and its
    minimum over one, given the other, is in closed form:

        M = tr P (E[G^T P^2 G] + damping |P|_F^2 I)^-1,     P = tr M (E[G M^2 G^T] + damping |M|_F^2 I)^-1.

    With the other factor divided by its trace, the trace of the new one is that of Q; the expectations, whose scale
    then depends on G alone, are means over all batches so far, later ones weighing more as their Q is better: the t-th
    as t.

    Attributes:
        damping: gamma.
        diagonal_row: whether P is kept diagonal, so that only the diagonal of E[G M^2 G^T] matters.
        row, col: P and M divided by their traces.
        row_moment, col_moment: weighted means of G M^2 G^T, [o, o], and of G^T P^2 G, [i, i].
        trace: tr Q.
        seen: gradients so far.
    """

    damping: float
    diagonal_row: bool
    row: Tensor
    col: Tensor
    row_moment: Tensor
    col_moment: Tensor
    trace: Tensor
    seen: int = 0

    @classmethod
    def start(cls, damping: float, diagonal_row: bool, like: Tensor, rows: int, cols: int) -> "LearnedFactors":
        """Q = I / damping, the inverse of no gradients."""
        row, col = (torch.eye(n, dtype=like.dtype, device=like.device) / max(1, n) for n in (rows, cols))
        trace = like.new_tensor(rows * cols / damping)
        return cls(damping, diagonal_row, row, col, torch.zeros_like(row), torch.zeros_like(col), trace)

    def learn(self, grads: Tensor, invert: Callable[[Tensor, float], Tensor]) -> Tensor:
        """Improve both factors by a batch.

        Args:
            grads: [m, o, i].
            invert: (matrix, damping) -> (matrix + damping I)^-1.

        Returns:
            the auxiliary loss on this batch before anything was learned from it.
        """
        self.seen += len(grads)
        weight = 2 * len(grads) / (self.seen + len(grads))  # of the t-th batch in the mean: t
        by_col = (self.row @ grads).flatten(0, 1)  # [m * o, i]
        moment = by_col.mT @ by_col / len(grads)
        loss = self._loss(moment)
        self.col_moment.lerp_(moment, weight)
        best = invert(self.col_moment, self.damping * float(self.row.square().sum()))
        self.col = best / best.trace()
        by_row = (grads @ self.col).transpose(0, 1).flatten(1)  # [o, m * i]
        moment = by_row @ by_row.mT / len(grads)
        self.row_moment.lerp_(moment.diagonal().diag() if self.diagonal_row else moment, weight)
        best = invert(self.row_moment, self.damping * float(self.col.square().sum()))
        self.trace, self.row = best.trace(), best / best.trace()
        return loss

    def factors(self) -> Factors:
        """P and M."""
        return Factors(self.row * self.trace, self.col)

    def _loss(self, moment: Tensor) -> Tensor:
        """The auxiliary loss where the mean of G^T P^2 G is `moment`: E|Q g|^2 = tr(M moment M)."""
        squared = (self.col @ moment * self.col).sum()
        squared += self.damping * self.row.square().sum() * self.col.square().sum()
        return 0.5 * self.trace**2 * squared - self.trace


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

    With labels sampled from the model, the default, F is the true Fisher matrix.

    Args:
        damping: gamma, > 0, in the units of a squared gradient.
        passes: over the data, each of num_grads gradients, with labels of its own where these are sampled.
        batch_size: gradients from which P and M are improved once.
        structure: of all parameters, or a dict name -> structure of some. Else it is "rows" for matrices and
            convolutions whose factors are at most 8,192 wide, and "block" for others.
        block_size: weights in a block, of "block".
        carry_over: begin each estimate but the first from the last one's P and M, where max_memory does not split it.
        monitor: called with (parameter, gradients so far, auxiliary loss on the last of them before they were learned
            from).
    """

    default_num_grads: ClassVar[int] = 2048

    def __init__(
        self,
        damping: float = 1e-6,
        passes: int = 1,
        batch_size: int = 64,
        structure: Union[str, Mapping[str, str], None] = None,
        block_size: int = 128,
        carry_over: bool = False,
        monitor: Optional[Monitor] = None,
    ) -> None:
        super().__init__()
        self.damping = checked_damping(damping, positive=True)
        self.passes = checked_count("passes", passes)
        self.batch_size = checked_count("batch_size", batch_size)
        self.block_size = checked_count("block_size", block_size)
        for wanted in structure.values() if isinstance(structure, Mapping) else [structure or "block"]:
            if wanted not in STRUCTURES:
                raise ValueError(f"expected structure to be one of {', '.join(STRUCTURES)}, got {wanted!r}")
        self.structure, self.carry_over, self.monitor = structure, carry_over, monitor
        self._learned: dict[str, LearnedFactors] = {}
        self._others: dict[str, Curvature] = {}  # of the parameters that are not Kronecker-factored

    @property
    def block_diagonal(self) -> bool:  # type: ignore[override]
        """Unless rows make up for each other."""
        given = self.structure.values() if isinstance(self.structure, Mapping) else [self.structure]
        return "kronecker" not in given

    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """That of the parameter's structure."""
        other = self._other(name, weight)
        return super().layout(name, weight) if other is None else other.layout(name, weight)

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Q = I / damping, or what was learned before."""
        super().start(weights)
        before = self._learned if self.carry_over else {}
        self._learned, self._others = {}, {}
        self._waiting: dict[str, list[Tensor]] = {}  # gradients that do not make up a batch yet
        for name, weight in weights.items():
            if (other := self._other(name, weight)) is not None:
                other.start({name: weight})
                self._others[name] = other
                continue
            apart = self._structure(name, weight) == "rows"
            fresh = LearnedFactors.start(self.damping, apart, self._like[name], *self._shape(name))
            if name in before and before[name].row.shape == fresh.row.shape:
                for part in ("row", "col", "trace"):
                    setattr(fresh, part, getattr(before[name], part).clone())
            self._learned[name] = fresh
            self._waiting[name] = []

    def state_bytes(self, name: str, weight: Tensor, num_grads: int) -> int:
        """Two factors and their moments, and the gradients of a batch."""
        if (other := self._other(name, weight)) is not None:
            return other.state_bytes(name, weight, num_grads)
        return 2 * factor_bytes(weight) + self.batch_size * weight.numel() * widened(weight.dtype).itemsize

    def update(self, observation: Observation) -> None:
        """Learn from every batch_size gradients."""
        for name, other in self._others.items():
            other.update(Observation(observation.count, gradients={name: observation.gradients[name]}))
        for name in self._learned:
            grads, waiting = observation.gradients[name].reshape(-1, *self._shape(name)), self._waiting[name]
            while len(grads):
                room = self.batch_size - sum(map(len, waiting))
                # A copy: the observer's tensor may be written again before the batch is full.
                waiting.append(grads[:room].to(self._like[name].dtype, copy=True))
                grads = grads[room:]
                if sum(map(len, waiting)) == self.batch_size:
                    self._learn(name)

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Two products of matrices, or what the parameter's structure takes."""
        result = super().mul({name: x for name, x in v.items() if name in self._learned})
        for name, other in self._others.items():
            if name in v:
                result |= other.mul({name: v[name]})
        return result

    def diag(self) -> dict[str, Tensor]:
        """Of Q."""
        result = {name: ops.kron_diag(*self.factors(name), self._ones(name)) for name in self._learned}
        result = {name: diagonal.reshape(self.layouts[name].shape) for name, diagonal in result.items()}
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
        return self._learned[name].factors()

    def state_dict(self) -> dict[str, Any]:
        """Factors, their moments and how many gradients went into them."""
        for name in self._learned:
            self.factors(name)
        return {
            "learned": {
                name: {part: getattr(learned, part) for part in (*LEARNED_TENSORS, "seen", "diagonal_row")}
                for name, learned in self._learned.items()
            },
            "others": {name: other.state_dict() for name, other in self._others.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        learned, others = state_entry(state, "learned"), state_entry(state, "others")
        for name, theirs in learned.items():
            if name in self._learned and state_entry(theirs, "diagonal_row") != self._learned[name].diagonal_row:
                raise ValueError(f"expected the state of {name} with rows apart, or not, as here; got the other")
        for part in LEARNED_TENSORS:
            own = {name: getattr(mine, part) for name, mine in self._learned.items()}
            load_tensors(own, {name: state_entry(theirs, part) for name, theirs in learned.items()})
        for name, mine in self._learned.items():
            mine.seen = int(learned[name]["seen"])
        if others.keys() != self._others.keys():
            raise ValueError(f"expected curvature of {', '.join(self._others)}, got that of {', '.join(others)}")
        for name, other in self._others.items():
            other.load_state_dict(others[name])

    def _learn(self, name: str) -> None:
        """From the gradients that wait."""
        grads = torch.cat(self._waiting[name])
        loss = self._learned[name].learn(grads, functools.partial(self.invert, name))
        self._waiting[name].clear()
        if self.monitor is not None:
            self.monitor(name, self._learned[name].seen, float(loss))

    def _structure(self, name: str, weight: Tensor) -> str:
        given = self.structure.get(name) if isinstance(self.structure, Mapping) else self.structure
        fits = weight.dim() > 1 and max(matrix_shape(weight)) <= LARGEST_FACTOR
        return given or ("rows" if fits else "block")

    def _other(self, name: str, weight: Tensor) -> Optional[Curvature]:
        """A model of this parameter alone, unless it has factors."""
        structure = self._structure(name, weight)
        if structure == "diagonal":
            return DiagonalFisher(self.damping)
        return BlockFisher(self.block_size, self.damping) if structure == "block" else None
