"""Every keyword once: types, defaults and checks, what models can use, JSON, and the command line made from them."""

import copy
import dataclasses
import gc
import inspect
import json
import pickle

import pytest
import torch
from oracles import batches
from torch import nn
from torch.nn import functional as F

from fishleg_ext import PruneConfig, Pruner, checkpoint, prune
from fishleg_ext.cli import main
from fishleg_ext.config import NOT_OF_PRUNER
from fishleg_ext.curvature import MODELS, Adam, BlockFisher, DiagonalFisher, FishLeg, Identity, Kronecker, Layerwise
from fishleg_ext.pruning.solvers import Exact

FIELDS = {field.name: field for field in dataclasses.fields(PruneConfig)}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


@pytest.fixture
def data(generator):
    x = torch.randn(96, 8, generator=generator)
    return batches(x, torch.randint(0, 4, (96,), generator=generator))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_prune_spells_out_what_the_config_says():
    parameters = inspect.signature(prune).parameters
    assert list(parameters)[3:-1] == list(FIELDS)
    for name, field in FIELDS.items():
        assert parameters[name].default == field.default, name
        assert parameters[name].annotation == field.type, name
    assert inspect.signature(Pruner).parameters["damping"].annotation == FIELDS["damping"].type


def test_every_setting_is_explained_and_in_the_docstrings():
    for name, field in FIELDS.items():
        assert field.metadata["help"].endswith("."), name
        assert callable(field.metadata["check"]), name
        for documented in (prune, Pruner, PruneConfig):
            assert f"    {name}: {field.metadata['help'][:30]}" in documented.__doc__


def test_a_config_and_its_keywords_are_the_same(net, data):
    config = PruneConfig(curvature="fishleg", num_grads=48, progress=False, seed=3)
    for arguments, keywords in (((config,), {}), ((PruneConfig(curvature="fishleg", progress=False),), vars(config))):
        keywords = {n: v for n, v in keywords.items() if n not in NOT_OF_PRUNER}
        models = [copy.deepcopy(net) for _ in range(2)]
        for model, pruner in (
            (models[0], Pruner(models[0], *arguments, **keywords)),
            (models[1], Pruner(models[1], curvature="fishleg", num_grads=48, progress=False, seed=3)),
        ):
            pruner.estimate(data, F.cross_entropy)
            assert pruner.prune_to(0.5).config == config, model
        assert same(*models)
    result = prune(net, data, **vars(dataclasses.replace(config, sparsity=0.5)))
    assert same(net, models[0])
    assert result.config == dataclasses.replace(config, sparsity=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4
    assert PruneConfig(seed=3) == PruneConfig(seed=3) != PruneConfig()


def test_a_pruner_prunes_to_the_sparsity_of_its_config(net):
    for settings, expected in (
        ({"sparsity": 0.25}, 0.25),
        ({"pattern": "2:4"}, 0.5),
        ({"scope": {"0.weight": 0.5}}, 1 / 3),
    ):
        pruner = Pruner(copy.deepcopy(net), PruneConfig(curvature="identity", **settings))
        pruner.estimate()
        assert pruner.prune_to().sparsity == pytest.approx(expected)
    with pytest.raises(TypeError, match="Pruner takes no sparsity: call prune_to"):
        Pruner(net, sparsity=0.5)
    with pytest.raises(TypeError, match="Pruner takes no recomputations"):
        Pruner(net, recomputations=2)
    with pytest.raises(ValueError, match="recomputations=2 of the config is for prune alone"):
        Pruner(net, PruneConfig(recomputations=2))
    with pytest.raises(TypeError, match="config to be a PruneConfig, got 0.5"):
        Pruner(net, 0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dampling'"):
        Pruner(net, dampling=0.1)


# every setting beside every model is used, or an error

GIVEN = {
    "num_grads": 16,
    "grad_batch_size": 2,
    "block_size": 4,
    "damping": 1e-3,
    "labels": "model",
    "likelihood": "categorical",
}
# Of "used" it is shown below that another value prunes otherwise. Identity reads nothing, but first_order= does.
USED = {
    "identity": {"num_grads", "grad_batch_size"},
    "diagonal": {"num_grads", "grad_batch_size", "damping", "labels"},
    "block": {"num_grads", "grad_batch_size", "block_size", "damping", "labels"},
    "low_rank": {"num_grads", "grad_batch_size", "block_size", "damping", "labels"},
    "layerwise": {"num_grads", "grad_batch_size", "damping"},
    "kronecker": {"num_grads", "grad_batch_size", "damping", "labels", "likelihood"},
    "fishleg": {"num_grads", "grad_batch_size", "block_size", "damping", "labels", "likelihood"},
}
OTHER = GIVEN | {"num_grads": 48, "grad_batch_size": 3, "block_size": 6, "damping": 1.0, "labels": "data"}


def instance(name):
    return MODELS[name]()


@pytest.mark.parametrize("model", USED)
@pytest.mark.parametrize("setting", GIVEN)
@pytest.mark.parametrize("form", ["name", "instance"])
def test_a_setting_is_used_or_refused(model, setting, form, net, data):
    curvature = model if form == "name" else instance(model)
    used = setting in USED[model] and not (form == "instance" and setting in ("block_size", "damping"))
    options = {"sparsity": 0.5, "curvature": curvature, "progress": False}
    before = [p.clone() for p in net.parameters()]
    if not used:
        with pytest.raises(ValueError, match=f"{setting}='?{GIVEN[setting]}"):
            prune(net, data, **options, **{setting: GIVEN[setting]})
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        return
    if model == "identity":
        options["first_order"] = True
    if model in ("low_rank", "fishleg") and setting == "block_size":  # of exact elimination; of the structure "block"
        options |= {"saliency": "exact"} if model == "low_rank" else {"params": ["0.weight", "0.bias", "2.weight"]}
    shared = {"num_grads": 24} if setting != "num_grads" else {}
    values = [GIVEN[setting], OTHER[setting]]
    if setting == "likelihood":
        values[1] = lambda outputs, generator: outputs.argmin(1)
    models = [copy.deepcopy(net) for _ in values]
    results = [prune(m, data, **options, **shared, **{setting: value}) for m, value in zip(models, values, strict=True)]
    assert not same(*models) or results[0].predicted_loss_increase != results[1].predicted_loss_increase


def test_settings_beside_an_instance_fill_what_it_leaves_open(net):
    pruner = Pruner(net, curvature=BlockFisher(num_grads=16), labels="model", num_grads=16, grad_batch_size=2)
    assert pruner.curvature.recipe == BlockFisher(num_grads=16, labels="model", grad_batch_size=2)
    for setting, value in {"num_grads": 32, "labels": "data", "grad_batch_size": 1}.items():
        recipe = BlockFisher(**{setting: GIVEN[setting]})
        with pytest.raises(ValueError, match=rf"{setting}='?{value}'? cannot be combined with BlockFisher\({setting}="):
            PruneConfig(curvature=recipe, **{setting: value})
    with pytest.raises(ValueError, match="block_size=4 cannot be combined .* set it on FishLeg"):
        PruneConfig(curvature=FishLeg(), block_size=4)


def test_settings_go_to_the_one_of_two_models_that_can_use_them(net):
    pruner = Pruner(net, curvature="layerwise", allocation="block", block_size=4, damping=0.5, labels="model")
    assert pruner.curvature.recipe == Layerwise(0.5)
    assert pruner.allocator.recipe == BlockFisher(4, labels="model")
    pruner = Pruner(net, curvature="kronecker", allocation=DiagonalFisher(), num_grads=8)
    assert (pruner.curvature.recipe, pruner.allocator.recipe) == (Kronecker(num_grads=8), DiagonalFisher(num_grads=8))
    with pytest.raises(ValueError, match="curvature 'layerwise' takes no labels"):
        PruneConfig(curvature="layerwise", allocation="identity", labels="model")


@pytest.mark.parametrize("wrong", [Identity, Layerwise])
def test_an_instance_refuses_what_it_has_no_use_for(wrong):
    with pytest.raises(ValueError, match=f"{wrong.__name__} takes no labels: it observes (nothing|layer inputs alone)"):
        wrong(labels="model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"curvature": "block", "likelihood": "gaussian"},
            "likelihood='gaussian' cannot be combined with labels='data'",
        ),
        ({"curvature": BlockFisher(likelihood="gaussian")}, "likelihood='gaussian' cannot be combined"),
        ({"scope": "layer", "allocation": "block"}, "allocation cannot be combined with scope='layer'"),
        ({"saliency": "fixed_order"}, "saliency='fixed_order' cannot be combined with one threshold"),
        ({"curvature": Layerwise(inputs="sequential"), "scope": "global"}, "sequential inputs cannot be combined"),
        ({"curvature": "layerwise", "first_order": True}, "first_order cannot be combined with Layerwise"),
        ({"first_order": float("nan")}, "first_order"),
        ({"scope": ["0.weight"]}, "expected scope to be"),
        ({"curvature": "blocks"}, "expected curvature to be identity, .*fishleg.*, got 'blocks'"),
        ({"allocation": "blocks"}, "expected allocation to be identity, .*fishleg.*, got 'blocks'"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**settings)


@pytest.mark.parametrize("wrong", [{"progress": "no"}, {"seed": 1.5}, {"recalibrate_batchnorm": 2}, {"curvature": 3}])
def test_settings_of_another_type(wrong):
    with pytest.raises(TypeError, match=f"expected {next(iter(wrong))} to be"):
        PruneConfig(**wrong)


# JSON

CONFIGS = [
    PruneConfig(),
    PruneConfig(scope={"0.weight": 0.5}, curvature="kronecker", seed=3, params=["0.weight", "re:2"]),
    PruneConfig(sparsity=0.5, curvature=FishLeg(structure={"0.weight": "block"}, adam=Adam(steps=3)), first_order=0.5),
    PruneConfig(sparsity=0.5, curvature=Layerwise(num_grads=8), allocation=BlockFisher(16)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_survives_json(config):
    assert PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_function_is_written_by_its_name_and_not_restored():
    config = PruneConfig(labels="model", likelihood=same)
    assert json.loads(json.dumps(config.to_dict()))["likelihood"] == {"function": f"{__name__}:same"}
    with pytest.raises(ValueError, match="likelihood was .*:same, which a file cannot hold"):
        PruneConfig.from_dict(config.to_dict())
    with pytest.raises(ValueError, match="settings of PruneConfig, got sparsely"):
        PruneConfig.from_dict({"sparsely": 0.5})


def test_an_export_has_the_settings(net, data, tmp_path):
    config = PruneConfig(sparsity=0.5, curvature=BlockFisher(4), num_grads=16, progress=False)
    result = prune(net, data, **vars(config))
    checkpoint.export_pruned(net, result, tmp_path)
    assert json.loads((tmp_path / "pruning.json").read_text())["config"]["curvature"]["block_size"] == 4
    assert checkpoint.import_pruned(net, tmp_path).config == config
    written = json.loads((tmp_path / "pruning.json").read_text())
    del written["config"]  # as versions before 0.2 wrote it
    (tmp_path / "pruning.json").write_text(json.dumps(written))
    imported = checkpoint.import_pruned(net, tmp_path)
    assert imported.config is None
    assert all(torch.equal(mask, imported.masks[name]) for name, mask in result.masks.items())


# memory


def test_one_spare_copy_of_the_weights_is_held(data, monkeypatch):
    """In prune as in prune_to: counted while weights are compensated."""
    counts = []
    compensate = Exact.compensate

    def counting(self, problem, kept):
        tensors = (x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and x.shape == (13, 8))
        counts.append(len({x.data_ptr() for x in tensors if x.is_floating_point()}))
        return compensate(self, problem, kept)

    monkeypatch.setattr(Exact, "compensate", counting)
    for rounds in (1, 2):
        net = nn.Linear(8, 13)
        prune(net, data, sparsity=0.5, num_grads=16, recomputations=rounds, block_size=13, progress=False)
    pruner = Pruner(net, num_grads=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.6)
    assert len(set(counts)) == 1


# the command line


def test_the_command_line_has_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    shown = capsys.readouterr().out
    for name in FIELDS:
        assert ("--quiet" if name == "progress" else f"--{name.replace('_', '-')}") in shown


# what is frozen, and what cannot be written


def test_a_scope_is_frozen_and_that_of_the_pruner_is_not_changed(net):
    given = {"0.weight": 0.5}
    config = PruneConfig(curvature="identity", scope=given)
    given["0.weight"] = 0.9
    assert config.scope == {"0.weight": 0.5}
    assert hash(config) == hash(copy.deepcopy(config)) == hash(pickle.loads(pickle.dumps(config)))
    for change in (lambda scope: scope.update(a=1), lambda scope: scope.pop("0.weight"), lambda scope: scope.clear()):
        with pytest.raises(TypeError, match="these settings are frozen"):
            change(config.scope)
    assert Pruner(net, config).target() == {"0.weight": 0.5}


@dataclasses.dataclass(frozen=True)
class Own(BlockFisher):
    """A recipe from outside the library, with a setting that JSON has no word for."""

    extra: object = None


def test_an_export_of_a_recipe_of_ones_own_is_written(net, data, tmp_path):
    result = prune(net, data, sparsity=0.5, curvature=Own(4, extra={1}), num_grads=16, progress=False)
    checkpoint.export_pruned(net, result, tmp_path)
    written = json.loads((tmp_path / "pruning.json").read_text())["config"]["curvature"]
    assert written["class"] == f"{__name__}:Own"
    assert written["extra"] == {"function": "{1}"}
    assert checkpoint.import_pruned(net, tmp_path).config is None
    with pytest.raises(ValueError, match="curvature was of the class .*:Own, which is none of fishleg_ext.curvature"):
        PruneConfig.from_dict(PruneConfig(curvature=Own()).to_dict())


def test_a_sparsity_beside_a_schedule_is_refused(net):
    with pytest.raises(ValueError, match="sparsity=0.9 of the config cannot be combined with schedule="):
        Pruner(net, PruneConfig(sparsity=0.9), schedule=lambda step: 0.25)


def test_the_cpu_implementations_prune_as_auto_does(net, data):
    other = copy.deepcopy(net)
    options = {"sparsity": 0.5, "num_grads": 16, "progress": False}
    prune(net, data, impl="cpu", **options)
    prune(other, data, **options)
    assert same(net, other)


def test_fixed_order_has_a_damping_of_its_own(net):
    for options, expected in (
        ({"saliency": "fixed_order"}, Layerwise(1e-2)),
        ({"saliency": "fixed_order", "damping": 1e-4}, Layerwise(1e-4)),
        ({}, Layerwise()),
    ):
        assert Pruner(net, curvature="layerwise", **options).estimator.recipe == expected
    assert Pruner(net, saliency="fixed_order", allocation="layerwise").allocator.recipe == Layerwise()
