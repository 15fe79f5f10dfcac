"""Other people's models under every curvature: what is observed is what autograd says, or it is refused by name."""

import copy
import warnings

import pytest
import torch
from recorder import Recorder
from torch import nn
from torch.utils import _pytree as pytree

import fishleg_ext
from fishleg_ext.curvature import MODELS, Kronecker, Layerwise
from fishleg_ext.observation.forward import call
from fishleg_ext.observation.observe import observe
from fishleg_ext.sparsity.parameters import choose_parameters, orientations_of
from models.zoo import SAMPLES, ZOO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of other libraries; what this one says is asked for where it matters
]
OF_INPUTS = [name for name, model in MODELS.items() if "inputs" in model().observes]
LAYERS = frozenset({"inputs", "output_gradients"})


@pytest.fixture(params=ZOO)
def case(request):
    return ZOO[request.param]()


def sample(case, s):
    cut = lambda x: x[s : s + 1] if isinstance(x, torch.Tensor) else x
    return pytree.tree_map(cut, (case.inputs, case.targets))


def weights_of(case):
    if case.refused and case.refused[0] in dict(case.model.named_parameters()):
        first = {case.refused[0]: case.model.get_parameter(case.refused[0])}
        return first | choose_parameters(case.model)
    return choose_parameters(case.model)


def gradients_of(case, s, weights):
    """By autograd, of the loss on one sample alone."""
    inputs, targets = sample(case, s)
    free = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    loss = case.loss_fn(call(case.model, free, inputs), targets)
    found = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(free.items(), found, strict=True)}


def observable(case):
    """Weights of products alone; the others are seen to be refused."""
    weights = weights_of(case)
    if case.refused is None:
        return weights
    name, reason = case.refused
    with pytest.raises(NotImplementedError, match=f"inputs of {name} cannot be observed.*{reason}"):
        observe_all(case, Recorder(LAYERS), {name: weights[name]}, [(case.inputs, case.targets)])
    return {name: weight for name, weight in weights.items() if is_observed(case, name, weight)}


def is_observed(case, name, weight):
    try:
        observe_all(case, Recorder(LAYERS), {name: weight}, [(case.inputs, case.targets)])
    except NotImplementedError as error:
        return name not in str(error)
    return True


def observe_all(case, observer, weights, data):
    orientations = orientations_of(case.model, weights)
    return observe(case.model, data, case.loss_fn, observer, weights, num_grads=SAMPLES, orientations=orientations)


def test_gradients_are_those_of_each_sample_alone(case):
    weights = weights_of(case)
    recorder = Recorder()
    observe(case.model, [(case.inputs, case.targets)], case.loss_fn, recorder, weights, num_grads=SAMPLES)
    for s in range(SAMPLES):
        for name, expected in gradients_of(case, s, weights).items():
            torch.testing.assert_close(recorder.gradients(name)[s], expected, rtol=1e-8, atol=1e-11)


def test_inputs_and_output_gradients_make_up_the_gradient_of_each_sample(case):
    weights = observable(case)
    if not weights:
        return
    orientations = orientations_of(case.model, weights)
    for s in range(SAMPLES):
        recorder = Recorder(LAYERS)
        observe_all(case, recorder, weights, [sample(case, s)])
        made = {n: torch.zeros(o.matrix_shape, dtype=torch.float64).flatten(1) for n, o in orientations.items()}
        seen = {what: [(n, r) for o in recorder.seen for n, r in getattr(o, what).items()] for what in LAYERS}
        for name in weights:
            # Inputs of the products that the loss depends on come in the order of the output gradients.
            mine = {what: [rows for n, rows in pairs if n == name] for what, pairs in seen.items()}
            if len(mine["inputs"]) != len(mine["output_gradients"]):
                continue
            for x, d in zip(mine["inputs"], mine["output_gradients"], strict=True):
                assert x.outputs == d.outputs
                made[name][slice(*x.outputs)] += torch.einsum("gno,gni->goi", d.rows, x.rows).flatten(0, 1)
        expected = gradients_of(case, s, weights)
        looked_up = {id(m.weight) for m in case.model.modules() if isinstance(m, nn.Embedding)}
        for name, gradient in expected.items():
            if id(weights[name]) not in looked_up:  # as an embedding its weight has another part of the gradient
                own = orientations[name].to_matrix(gradient).flatten(1)
                torch.testing.assert_close(made[name], own, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recipe", [Layerwise(), Kronecker(structure="kronecker")])
def test_samples_together_are_samples_alone(case, recipe):
    weights = observable(case)
    if not weights:
        return
    matrices = {n: o.to_matrix(weights[n].detach()) for n, o in orientations_of(case.model, weights).items()}
    together, alone = recipe.start(matrices), recipe.start(matrices)
    observe_all(case, together, weights, [(case.inputs, case.targets)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for s in range(SAMPLES):
            observe_all(case, alone, weights, [sample(case, s)])
    mine, theirs = together.state_dict(), alone.state_dict()
    for key in ("count", "counts"):
        assert mine.get(key) == theirs.get(key)
    for key in ("gram", "row", "col"):
        assert not mine.get(key) or any(moment.any() for moment in mine[key].values())
        for name, moment in mine.get(key, {}).items():
            torch.testing.assert_close(moment, theirs[key][name], rtol=1e-8, atol=1e-10)


def test_layer_inputs_are_the_jacobian_of_the_layer(case):
    """Of each layer that is a module: the derivative of its outputs by the weights of one output, for all its calls.

    Positions of padding are left out.
    """
    weights = observable(case)
    mask = case.inputs.get("attention_mask") if isinstance(case.inputs, dict) else None
    names, calls = {id(weight): name for name, weight in weights.items()}, []
    modules = [m for m in case.model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    modules = [m for m in modules if id(m.weight) in names]
    keep = lambda module, args, kwargs, output: calls.append((module, copy.deepcopy((args, kwargs))))
    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    with torch.no_grad():
        call(case.model, {}, case.inputs)
    for handle in handles:
        handle.remove()
    expected = {}
    for module, (args, kwargs) in calls:
        channel = -1 if isinstance(module, nn.Linear) else 1
        forward = lambda w, m=module, a=args, k=kwargs: torch.func.functional_call(m, {"weight": w}, a, k)
        one = lambda w, c=channel, f=forward: f(w).select(c, 0).flatten()
        jacobian = torch.autograd.functional.jacobian(one, module.weight.detach(), vectorize=True)
        orientation = orientations_of(module, {"w": module.weight})["w"]
        rows = orientation.to_matrix(jacobian)[:, 0].flatten(1)  # of the first output
        if mask is not None and len(rows) == mask.numel():
            rows = rows[mask.flatten() != 0]
        expected[names[id(module.weight)]] = expected.get(names[id(module.weight)], 0) + rows.mT @ rows
    matrices = {n: o.to_matrix(weights[n].detach()) for n, o in orientations_of(case.model, weights).items()}
    estimate = Layerwise().start(matrices)
    if weights:
        observe_all(case, estimate, weights, [(case.inputs, case.targets)])
    for name, moment in expected.items():
        torch.testing.assert_close(estimate.state_dict()["gram"][name][0], moment, rtol=1e-8, atol=1e-10)
    assert expected or not modules


@pytest.mark.parametrize("curvature", MODELS)
def test_every_curvature_prunes(case, curvature):
    """In the library's own way; weights that a curvature refuses are left out."""
    weights = observable(case) if curvature in OF_INPUTS else weights_of(case)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    if not weights:
        return
    options = {"labels": "data"} if MODELS[curvature]().observes - {"inputs"} else {}
    result = fishleg_ext.prune(
        case.model,
        [(case.inputs, case.targets)],
        case.loss_fn,
        sparsity=0.5,
        curvature=curvature,
        params=list(weights),
        num_grads=SAMPLES,
        progress=False,
        **options,
    )
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    for name, mask in result.masks.items():
        assert not case.model.get_parameter(name)[~mask].any()
    assert any((case.model.get_parameter(n)[m] != before[n][m]).any() for n, m in result.masks.items()) or (
        curvature in ("identity", "layerwise_diagonal", "diagonal")
    )
