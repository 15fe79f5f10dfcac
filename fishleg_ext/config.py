"""Every keyword of a pruning, once: its type, default, check and help text."""

import dataclasses
import inspect
import numbers
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fishleg_ext import curvature as curvatures
from fishleg_ext.common.arguments import (
    checked_count,
    checked_damping,
    checked_flag,
    checked_integer,
    checked_sparsity,
    checked_type,
    one_of,
)
from fishleg_ext.common.settings import FrozenDict, Settings, setting
from fishleg_ext.curvature import Curvature, checked_curvature, make_recipes
from fishleg_ext.observation.likelihoods import LIKELIHOODS, Likelihood, checked_likelihood
from fishleg_ext.ops.dispatch import IMPLS
from fishleg_ext.pruning.solvers import SOLVERS, Solver
from fishleg_ext.sparsity.parameters import ParameterChoice
from fishleg_ext.sparsity.patterns import Pattern

SCOPES = ("global", "flops", "layer", "row")
NOT_OF_PRUNER = ("sparsity", "recomputations", "holdout")  # settings that `prune` alone has as keywords
SHARED = ("num_grads", "grad_batch_size", "block_size", "damping", "labels", "likelihood")  # of the recipes


def _checked_scope(name: str, value: Any) -> str | FrozenDict:
    if isinstance(value, Mapping):
        return FrozenDict((key, checked_sparsity(f"sparsity of {key}", sparsity)) for key, sparsity in value.items())
    if not isinstance(value, str) or value not in SCOPES:
        raise ValueError(f"expected {name} to be {', '.join(map(repr, SCOPES))} or a dict of sparsities, got {value!r}")
    return value


def _checked_pattern(name: str, value: Any) -> str:
    return Pattern.parse(value).name


def _checked_params(name: str, value: Any) -> ParameterChoice:
    return value if isinstance(value, str) or callable(value) else tuple(value)


def _checked_blocks(name: str, value: Any) -> bool | str:
    if not isinstance(value, (bool, str)):
        raise TypeError(f"expected {name} to be a bool or the name of a list of blocks, got {value!r}")
    return value


def _checked_seed(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected {name} to be an integer, got {value!r}")
    return int(value)


def _checked_share(name: str, value: Any) -> bool | float:
    if not isinstance(value, (bool, numbers.Real)) or not 0 <= float(value) <= 1:
        raise ValueError(f"expected {name} to be a bool or a share of the step in [0, 1], got {value!r}")
    return value if isinstance(value, bool) else float(value)


@dataclass(frozen=True, kw_only=True)
class PruneConfig(Settings):
    """The keywords of `prune` and `Pruner`, checked, in one value that can be compared, printed and written as JSON.

    `dataclasses.replace(config, sparsity=0.9)` changes one, `prune(model, data, **vars(config))` uses them.

    Args:
    {settings}

    Raises:
        ValueError, TypeError: a value out of its range, two settings that contradict each other, or a setting that the
            chosen curvature cannot use.

    Examples:
        >>> PruneConfig(sparsity=0.8, pattern="block4").pattern
        'block4'
    """

    sparsity: float | None = setting(
        None,
        checked_sparsity,
        "pruned weights over all weights, in [0, 1): exactly round(sparsity * n) become zero, of all n weights or, "
        'with scope="layer", of each parameter\'s. With pattern="n:m" it is 1 - n/m, and may be omitted.',
    )
    curvature: str | Curvature = setting(
        "block",
        checked_curvature,
        'the model of the Fisher matrix: "identity" (magnitude), "diagonal", "block" (WoodFisher, oBERT, CAP), '
        '"low_rank" (M-FAC), "layerwise" (OBC), "layerwise_diagonal" (Wanda), "kronecker" (K-FAC), "fishleg", or, in '
        'Python, a recipe such as fishleg_ext.curvature.FishLeg(...). Under "kronecker" and "fishleg" the biases of '
        "the pruned layers are compensated with the weights; no other parameters ever change.",
        plain=str,
    )
    saliency: str | None = setting(
        None,
        one_of(*SOLVERS),
        'the solver: "exact" (greedy elimination in blocks), "simultaneous" (single-weight formula), or "fixed_order" '
        '(SparseGPT: column after column), or "admm" (ALPS: all weights of a parameter together); the last two not '
        'with scope="global" or "row". None is the curvature\'s default: simultaneous for identity, diagonal, low_rank '
        "and layerwise_diagonal, exact for the others.",
        choices=tuple(SOLVERS),
    )
    scope: str | Mapping[str, float] | None = setting(
        None,
        _checked_scope,
        '"global" (one threshold for all parameters), "flops" (the same, for costs over how often a sample\'s forward '
        'pass uses the weight), "layer" (the same sparsity in each), "row" (in each of their rows, that is for each '
        "output, as near as can be), or a dict name -> sparsity; parameters not in it "
        'stay dense. None is the curvature\'s default: "layer" for layerwise, "row" for layerwise_diagonal, "global" '
        'for the others, but "layer" where block_by_block prunes each block before the next is observed.',
        plain="scope",
    )
    pattern: str = setting(
        "unstructured",
        _checked_pattern,
        '"unstructured"; "n:m", such as "2:4", keeps n of each m consecutive inputs of each output, of a convolution '
        'input channels, as sparse tensor cores take them; "blockN", such as "block4", keeps or prunes N consecutive '
        "weights of the fan-in together, the nearest multiple of N to sparsity. Parameters with inputs that m, or a "
        "fan-in that N, does not divide stay dense, with a warning, unless `params` names them.",
    )
    params: ParameterChoice | None = setting(
        None,
        _checked_params,
        'a name, "re:..." (searched for in names), a list of these, or a predicate (name, parameter) -> bool. None is '
        "the weight of every Linear and Conv layer, the projections of nn.MultiheadAttention and, in models of "
        "transformers, Conv1D and fused weights of experts, whether or not they require a gradient.",
        plain="list",
    )
    num_grads: int | None = setting(
        None,
        checked_count,
        "gradients the Fisher matrix is estimated from; None is the curvature's default, 1,024, for fishleg 2,048.",
    )
    grad_batch_size: int | None = setting(None, checked_count, "samples in each gradient; None is 1.")
    recomputations: int = setting(
        1,
        checked_count,
        "rounds of estimating and pruning; the density falls geometrically.",
    )
    block_size: int | None = setting(
        None, checked_count, "weights in a block of the Fisher matrix, for models that have blocks; None is 128."
    )
    damping: float | None = setting(
        None,
        checked_damping,
        "added to the Fisher matrix's diagonal; None is the curvature's default, 1e-5, for kronecker and fishleg 1e-6. "
        "For layerwise a share of the mean of the diagonal, 1e-4, or 1e-2 with saliency='fixed_order'.",
    )
    labels: str | None = setting(
        None,
        one_of("data", "model"),
        '"data" (empirical Fisher matrix) or "model" (sampled from the likelihood: true Fisher matrix; the classes of '
        "cross_entropy by importance, so that networks that are sure of their answers give as much as others). None is "
        'the curvature\'s default: "model" for kronecker and fishleg, "data" for the others.',
        choices=("data", "model"),
    )
    likelihood: Likelihood | None = setting(
        None,
        checked_likelihood,
        'of labels="model": "categorical" (classes in dimension 1 of the outputs), "tokens" (in the last), '
        '"next_token" (in the last, for the target one position later), "gaussian", "bernoulli" or '
        "(outputs, generator) -> targets. "
        "May be None with cross_entropy, and with a loss of the model's own that is one of the first three.",
        choices=tuple(LIKELIHOODS),
    )
    recalibrate_batchnorm: bool = setting(
        False, checked_flag, "afterwards recompute running statistics of BatchNorm on all of the data."
    )
    max_memory: int | None = setting(
        None, checked_count, "bytes for curvature at a time; splits the parameters over several passes over the data."
    )
    impl: str = setting(
        "auto",
        one_of(*IMPLS),
        '"auto", "reference", "triton", "cuda" or "cpu"; for every op.',
        choices=IMPLS,
    )
    seed: int = setting(0, _checked_seed, "of sampled labels, and of PyTorch's RNG while the data is read.")
    progress: bool = setting(True, checked_flag, "show progress bars (where standard error is a terminal).")
    allocation: str | Curvature | None = setting(
        None,
        checked_curvature,
        "another curvature, by name or, in Python, as a recipe, in place of `scope`: with its own default saliency and "
        "one threshold for all parameters it says how many weights of each are pruned. Of `max_memory` each of the two "
        "may take half.",
        plain=str,
    )
    min_density: float = setting(
        0.0,
        checked_sparsity,
        "each parameter keeps at least this fraction of its weights, and of others more are pruned; an error where "
        "sparsity leaves less to a parameter, or to all of them.",
    )
    first_order: bool | float = setting(
        False,
        _checked_share,
        "count the gradient of the loss, too, which is not zero where training has not ended (WoodTaylor): the weights "
        "also take part of the step to where the curvature says the loss is lowest. A number is which part, 1.0 as "
        "published; True looks for the part at which the loss on the same samples is lowest, and takes half of that. "
        "Reads the data twice more.",
        plain="share",
    )
    block_by_block: bool | str = setting(
        False,
        _checked_blocks,
        "observe, prune and run again the repeated blocks of the model, such as the layers of a transformer, one after "
        "the other, so that the curvature of one block is held at a time and the network runs once; parameters outside "
        "of them stay dense. True finds the list that holds the blocks, a name, such as 'model.layers', says which.",
        plain="optional",
    )
    block_gradients: str = setting(
        "outputs",
        one_of("outputs", "loss"),
        'with block_by_block, and a curvature of gradients, what these are of: "outputs", the squared error of the '
        "block's own outputs, relative to their mean square, given what the pruned blocks before it make; "
        '"loss", the loss of the network as it is at the estimate, so that one threshold for all parameters is '
        "possible; the hidden states before and the gradients after every block are held for it.",
        choices=("outputs", "loss"),
    )
    offload: bool = setting(
        False, checked_flag, "with block_by_block, hold hidden states in the memory of the host rather than of the GPU."
    )
    holdout: int = setting(
        0,
        checked_integer,
        "samples, after those that the curvature is estimated from, on which the divergence of the pruned network's "
        "outputs from the dense one's is measured in the end, without labels; 0 measures nothing. Reads the data once "
        "more.",
    )

    def __post_init__(self) -> None:
        """Check every setting by itself, then all of them together."""
        super().__post_init__()
        recipe, allocation = self.recipes()
        if isinstance(self.scope, Mapping) and self.sparsity is not None:
            raise ValueError("sparsity= cannot be combined with scope={...}: both say how many weights")
        if self.first_order and recipe.observes == {"inputs"}:
            raise ValueError(
                f"first_order cannot be combined with {type(recipe).__name__}, which knows the errors of outputs, not "
                "the loss"
            )
        if self.block_by_block:
            self._check_blocks(recipe)
        elif self.block_gradients != "outputs" or self.offload:
            raise ValueError("block_gradients and offload are settings of block_by_block, which is not asked for")
        if allocation is not None:
            if Pattern.parse(self.pattern).m:
                raise ValueError(
                    f"allocation cannot be combined with pattern={self.pattern!r}, of which all parameters have as much"
                )
            if self.scope is not None:
                raise ValueError(f"allocation cannot be combined with scope={self.scope!r}: both say how many weights")
            if allocation.sequential:
                raise ValueError("allocation cannot be of sequential inputs: it is of all parameters at once")
        elif self.scope_of(recipe) == "row" and self.solver_of(recipe).sweeps:
            raise ValueError(
                f"saliency={self.saliency!r} cannot be combined with scope='row': it chooses among the weights of "
                "several rows"
            )
        elif self.scope_of(recipe) in ("global", "flops"):
            counts = "give scope='layer', a dict of sparsities or allocation="
            if self.walks(recipe):
                raise ValueError(
                    f"block_by_block cannot be combined with one threshold for all: {counts}, or, where the curvature "
                    "is of gradients, block_gradients='loss'"
                )
            if self.solver_of(recipe).sweeps:
                raise ValueError(f"saliency={self.saliency!r} cannot be combined with one threshold for all: {counts}")
            if recipe.sequential:
                raise ValueError(f"sequential inputs cannot be combined with one threshold for all: {counts}")

    def _check_blocks(self, recipe: Curvature) -> None:
        kind, of_gradients = type(recipe).__name__, bool(recipe.observes - {"inputs"})
        if not recipe.observes:
            raise ValueError(f"block_by_block cannot be combined with {kind}, which observes nothing")
        if self.first_order:
            raise ValueError("first_order cannot be combined with block_by_block")
        if self.block_gradients == "loss" and not of_gradients:
            raise ValueError(f"block_gradients='loss' cannot be combined with {kind}, which observes inputs alone")
        if not of_gradients:
            return
        if (recipe.grad_batch_size or 1) > 1:
            raise ValueError(f"grad_batch_size={recipe.grad_batch_size} cannot be combined with block_by_block")
        if self.walks(recipe) and (recipe.labels == "data" or recipe.likelihood is not None):
            raise ValueError(
                "labels and likelihood are of the network's loss: give block_gradients='loss', or leave them out"
            )
        if not self.walks(recipe) and (recipe.num_passes > 1 or "fisher_products" in recipe.observes):
            raise ValueError(f"block_gradients='loss' cannot be combined with several passes or products of {kind}")

    def recipes(self) -> tuple[Curvature, Curvature | None]:
        """Make the recipes of curvature and allocation, with the settings that are given beside them."""
        return make_recipes(self.curvature, self.allocation, {name: getattr(self, name) for name in SHARED})

    def solver_of(self, recipe: Curvature) -> Solver:
        """Return the solver asked for, or the recipe's default."""
        return SOLVERS[self.saliency or recipe.default_saliency]

    def scope_of(self, recipe: Curvature) -> str | Mapping[str, float]:
        """Return the scope asked for, or the recipe's default; with an allocation it is global."""
        if self.allocation is not None:
            return "global"
        return self.scope or ("layer" if self.walks(recipe) else recipe.default_scope)

    def walks(self, recipe: Curvature) -> bool:
        """Tell whether each block is pruned before the next is observed."""
        return bool(self.block_by_block) and not (self.block_gradients == "loss" and recipe.observes - {"inputs"})

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON has them; a recipe by its class and settings, a function by its name."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "PruneConfig":
        """Make what `to_dict` returned.

        Raises:
            ValueError: a setting was a function, or is unknown.
        """
        if unknown := settings.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"expected settings of PruneConfig, got {', '.join(sorted(unknown))}")
        return cls(**{name: _restored(name, value) for name, value in settings.items()})


def config_of(config: PruneConfig | None, settings: dict[str, Any]) -> PruneConfig:
    """Make the settings of a Pruner from a config, keywords or both."""
    for name in NOT_OF_PRUNER:
        if name in settings:
            raise TypeError(f"Pruner takes no {name}: call prune_to, as often as you like, or give it a schedule")
    if config is None:
        return PruneConfig(**settings)
    checked_type("config", config, PruneConfig, "a PruneConfig")
    if config.recomputations != 1:
        raise ValueError(
            f"recomputations={config.recomputations} of the config is for prune alone: call estimate and prune_to as "
            "often, or give the Pruner a schedule"
        )
    if config.holdout:
        raise ValueError(f"holdout={config.holdout} of the config is for prune alone, which knows the dense network")
    return dataclasses.replace(config, **settings)


def with_settings(init: Callable[..., None]) -> inspect.Signature:
    """Make the signature of Pruner from that of its __init__, with the settings in the place of **settings."""
    own = list(inspect.signature(init).parameters.values())[1:-1]
    fields = [field for field in dataclasses.fields(PruneConfig) if field.name not in NOT_OF_PRUNER]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        own + [inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type) for f in fields]
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        known = getattr(curvatures, kind.__name__, None) is kind
        name_of = kind.__name__ if known else f"{kind.__module__}:{kind.__qualname__}"
        return {"class": name_of} | {name: _plain(v) for name, v in vars(value).items()}
    if callable(value):
        return {"function": f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}"}
    if isinstance(value, Mapping):
        return {"dict": {name: _plain(v) for name, v in value.items()}}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else {"function": repr(value)}


def _restored(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        if "function" in value:
            raise ValueError(f"{name} was {value['function']}, which a file cannot hold")
        if "dict" in value:
            return dict(value["dict"])
        if not hasattr(curvatures, str(value.get("class"))):
            raise ValueError(f"{name} was of the class {value.get('class')}, which is none of fishleg_ext.curvature")
        settings = {key: _restored(key, v) for key, v in value.items() if key != "class"}
        return getattr(curvatures, value["class"])(**settings)
    return tuple(_restored(name, v) for v in value) if isinstance(value, list) else value


def describe_settings() -> str:
    """Return the help texts of all settings, as lines of a docstring's Args."""
    lines = []
    for field in dataclasses.fields(PruneConfig):
        text = f"{field.name}: {field.metadata['help']}"
        lines.append(textwrap.fill(text, 120, initial_indent=" " * 4, subsequent_indent=" " * 8))
    return "\n".join(lines)


def documented(thing: Any) -> Any:
    """Put the help texts of all settings where a docstring has {settings}."""
    if thing.__doc__ is None:  # python -OO
        return thing
    doc = inspect.cleandoc(thing.__doc__)
    thing.__doc__ = doc.replace("{settings}", describe_settings())
    return thing


documented(PruneConfig)
