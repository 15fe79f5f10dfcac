"""The repeated blocks of a network one by one: what each is given, and what is pruned, is that of the whole."""

import copy
import math

import pytest
import torch
from oracles import usable, with_estimate
from small import assert_same, snapshot
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner, prune
from fishleg_ext.curvature import BlockFisher, FishLeg, Kronecker, Layerwise, LayerwiseDiagonal
from fishleg_ext.curvature.layerwise import LayerwiseEstimate
from fishleg_ext.observation.batches import chunks
from fishleg_ext.observation.blocks import find_blocks
from fishleg_ext.observation.walk import BlockWalk, CannotWalk

WIDTH, VOCABULARY, LENGTH, SAMPLES = 8, 11, 5, 70
CPU = torch.device("cpu")


class Attending(nn.Module):
    """A block of a transformer: attention of one head, with a mask and a table of positions, and an MLP."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.calls = 0

    def forward(self, hidden, mask, *, positions, cache=None):
        self.calls += len(hidden)
        q, k, v = self.qkv(hidden + positions).chunk(3, dim=-1)
        hidden = hidden + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        if cache is not None:
            cache.append(len(hidden))  # which must not grow from call to call
            hidden = hidden * len(cache)
        return (hidden + self.down(torch.relu(self.up(hidden))), "no tensor")


class Decoder(nn.Module):
    """A causal language model of three blocks, whose head is tied to its embedding."""

    def __init__(self, blocks=3):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Attending() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, padding=None):
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None]
        if padding is not None:
            mask = mask & padding[:, None] | torch.eye(length, dtype=torch.bool)
        positions = torch.linspace(0, 1, length, dtype=self.embedding.weight.dtype)[:, None]
        hidden, caches = self.embedding(tokens), [[] for _ in self.layers]
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, _ = layer(hidden, mask, positions=positions, cache=cache)
        return self.head(hidden)


def next_token(outputs, targets):
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def decoder(**options):
    torch.manual_seed(0)
    return Decoder(**options).double()


def tokens(count=SAMPLES, size=16, padded=False):
    x = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    if not padded:
        return [(part, part) for part in x.split(size)]
    padding = torch.arange(LENGTH) < torch.randint(
        2, LENGTH + 1, (count, 1), generator=torch.Generator().manual_seed(2)
    )
    return [((part, keep), part) for part, keep in zip(x.split(size), padding.split(size), strict=True)]


def pruned(model, data, **options):
    model = copy.deepcopy(model)
    common = {"sparsity": 0.5, "num_grads": SAMPLES, "progress": False}
    result = prune(model, data, next_token, **(common | options))
    return model, result


def of_blocks(model):
    return [n for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() > 1]


def assert_same_weights(a, b, **tolerance):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        if tolerance:
            torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        else:
            assert torch.equal(x, y), name


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"curvature": Layerwise(inputs="dense")},
        {"curvature": Layerwise(inputs="dense"), "saliency": "fixed_order"},
        {"curvature": Layerwise(inputs="dense"), "scope": "row", "max_memory": 20_000},
        {"curvature": LayerwiseDiagonal(inputs="dense"), "sparsity": None, "pattern": "2:4"},
    ],
    ids=["exact", "fixed_order", "rows", "diagonal"],
)
def test_block_by_block_is_the_whole_network_to_the_bit_where_inputs_are_dense(options, padded):
    model, data = decoder(), tokens(padded=padded)
    whole, expected = pruned(model, data, params=of_blocks(model), **options)
    walked, result = pruned(model, data, block_by_block=True, **options)
    assert_same_weights(walked, whole)
    assert result.predicted_loss_increase == pytest.approx(expected.predicted_loss_increase)
    assert result.sparsity == 0.5
    assert result.dense == {"embedding.weight": "it lies outside of the blocks of layers"}


def verified_samples(blocks, chunk_count):
    """Samples run beside those of the data: of the trace, and of each block's verification and comparisons."""
    alone, traced = 3 + 3 * 3, 2 + 2
    return traced + alone + chunk_count


@pytest.mark.parametrize(("inputs", "passes"), [("dense", 1), ("sequential", 2)])
def test_each_block_sees_the_data_once_to_observe_and_once_more_if_it_runs_pruned(inputs, passes):
    model, data = decoder(), tokens()
    walked, _ = pruned(model, iter(data), block_by_block="layers", curvature=Layerwise(inputs=inputs))
    *before, last = [layer.calls for layer in walked.layers]
    chunk_count = math.ceil(SAMPLES / 64)
    for calls in before:
        assert passes * SAMPLES <= calls <= passes * SAMPLES + verified_samples(3, chunk_count)
    assert SAMPLES <= last <= SAMPLES + verified_samples(3, chunk_count)


@pytest.mark.parametrize("options", [{}, {"saliency": "fixed_order"}, {"scope": "row"}], ids=str)
def test_sequential_inputs_are_those_of_the_network_whose_first_blocks_are_pruned(options):
    model, data = decoder(), tokens()
    walked, _ = pruned(model, data, block_by_block=True, curvature="layerwise", **options)
    step_by_step = model
    for index in range(3):
        names = [name for name in of_blocks(model) if name.startswith(f"layers.{index}.")]
        step_by_step, _ = pruned(step_by_step, data, params=names, curvature="layerwise", **options)
    assert_same_weights(walked, step_by_step)


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("recipe", [BlockFisher, Kronecker, FishLeg], ids=lambda recipe: recipe.name)
def test_gradients_of_the_loss_are_those_of_the_whole_network(recipe, labels):
    model, data = decoder(), tokens()
    options = usable(curvature=recipe.name, damping=1e-4, block_size=8) | {"curvature": recipe.name, "labels": labels}
    options |= {"likelihood": "next_token"} if labels == "model" else {}
    whole, expected = pruned(model, data, params=of_blocks(model), **options)
    walked, result = pruned(model, data, block_by_block=True, block_gradients="loss", **options)
    assert_same_weights(walked, whole, rtol=1e-6, atol=1e-8)
    assert result.layer_sparsity == expected.layer_sparsity  # one threshold for all
    assert len({*result.layer_sparsity.values()}) > 1


class FirstBlock(nn.Module):
    """The network up to the outputs of its first block, in units of their root mean square."""

    def __init__(self, model, unit):
        super().__init__()
        self.model, self.unit = model, unit

    def forward(self, tokens):
        found = []
        handle = self.model.layers[0].register_forward_hook(lambda *args: found.append(args[2][0]))
        self.model(tokens)
        handle.remove()
        return found[0] / self.unit


@pytest.mark.parametrize("recipe", ["kronecker", "fishleg", "block"])
def test_gradients_of_outputs_are_those_of_a_gaussian_likelihood_about_the_blocks_own(recipe):
    model, data = decoder(), tokens(64)
    options = usable(curvature=recipe, damping=1e-3, block_size=8)
    options |= {"curvature": recipe, "num_grads": 64, "scope": "layer"}
    walked, _ = pruned(model, data, block_by_block=True, **options)
    alone = FirstBlock(copy.deepcopy(model), 1.0)
    everything = torch.cat([x for x, _ in data])
    with torch.no_grad():
        alone.unit = float(alone(everything).square().mean().sqrt())
    names = [f"model.{name}" for name in of_blocks(model) if name.startswith("layers.0.")]
    pairs = [(x, torch.zeros(len(x), LENGTH, WIDTH, dtype=torch.float64)) for x, _ in data]
    given = {"labels": "model", "likelihood": "gaussian", "sparsity": 0.5, "params": names, "progress": False}
    prune(alone, pairs, F.mse_loss, **options, **given)
    for name in names:
        own = walked.get_parameter(name.removeprefix("model."))
        torch.testing.assert_close(own, alone.get_parameter(name), rtol=1e-6, atol=1e-9)


def test_rounds_and_schedules_begin_each_walk_with_the_network_of_now():
    model, data = decoder(), tokens()
    walked, result = pruned(model, data, block_by_block=True, curvature="layerwise", recomputations=2)
    assert result.sparsity == 0.5
    assert len(result.history) == 2
    twice = copy.deepcopy(model)
    pruner = Pruner(
        twice, curvature="layerwise", block_by_block=True, num_grads=SAMPLES, data=data, loss_fn=next_token,
        schedule={0: 1 - 0.5**0.5, 1: 0.5}.get, progress=False,
    )  # fmt: skip
    assert pruner.step()
    assert pruner.step()
    assert_same_weights(walked, twice)
    assert pruner.estimator.walk is None  # nothing is held between steps


def test_an_allocation_of_the_whole_network_goes_with_compensation_block_by_block():
    model, data = decoder(), tokens()
    options = {"allocation": Kronecker(damping=1e-4, labels="data"), "params": of_blocks(model)}
    walked, result = pruned(model, data, block_by_block=True, curvature=Layerwise(inputs="dense"), **options)
    whole, _ = pruned(model, data, curvature=Layerwise(inputs="dense"), **options)
    assert_same_weights(walked, whole)
    assert result.sparsity == 0.5
    assert len({*result.layer_sparsity.values()}) > 1


def test_blocks_without_weights_to_prune_are_run_and_left_as_they_are():
    model, data = decoder(), tokens()
    names = [name for name in of_blocks(model) if not name.startswith("layers.1.")]
    whole, _ = pruned(model, data, curvature=Layerwise(inputs="dense"), params=names)
    walked, _ = pruned(model, data, curvature=Layerwise(inputs="dense"), params=names, block_by_block=True)
    assert_same_weights(walked, whole)


@pytest.mark.parametrize("samples", [1, 2])
def test_data_of_few_samples_and_of_batches_of_one(samples):
    model, data = decoder(), tokens(samples, size=1)
    options = {"num_grads": samples, "curvature": Layerwise(1e-2, inputs="dense")}
    whole, _ = pruned(model, data, params=of_blocks(model), **options)
    walked, _ = pruned(model, data, block_by_block=True, **options)
    assert_same_weights(walked, whole)


def test_batches_of_different_lengths_and_as_many_samples_as_positions():
    model = decoder()
    shorter = [(x[:, :3], y[:, :3]) for x, y in tokens(3, size=3)]
    data = [*tokens(LENGTH, size=LENGTH), *shorter]  # of which a table of positions has as many rows
    options = {"num_grads": 8, "curvature": Layerwise(inputs="dense")}
    whole, _ = pruned(model, data, params=of_blocks(model), **options)
    walked, _ = pruned(model, data, block_by_block=True, **options)
    assert_same_weights(walked, whole)


def test_fewer_samples_than_asked_for_are_said_once(recwarn):
    pruned(decoder(), tokens(8), block_by_block=True, curvature="layerwise", num_grads=20)
    assert [str(w.message) for w in recwarn] == ["the data ended after 8 of 20 samples; these are used"]


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="at least one sample"):
        pruned(decoder(), [], block_by_block=True, curvature="layerwise")


class Wired(nn.Module):
    """Blocks that hang together in another way than one after the other."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first = how, nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        x, (a, b, c) = self.first(x), self.blocks
        if self.how == "twice":
            return b(a(a(x)))
        if self.how == "left out":
            return b(a(x))
        if self.how == "another order":
            return c(a(b(x)))
        if self.how == "side by side":
            return a(x) + b(x) + c(x)
        if self.how == "a norm between":
            return c(F.normalize(b(F.normalize(a(x)))))
        y = a(x)
        return c(b(y) + y if self.how == "skip" else y)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("twice", "blocks are not called once each"),
        ("left out", "blocks.2 was not called"),
        ("another order", "blocks are not called once each"),
        ("side by side", "blocks.1 is given nothing of what blocks.0 returns"),
        ("a norm between", "blocks.1 is given nothing of what blocks.0 returns"),
        ("skip", "blocks.2 is given nothing of what blocks.1 returns"),
    ],
)
def test_networks_whose_blocks_are_no_chain_are_refused_and_left_as_they_were(how, why):
    model, data = Wired(how), [(torch.randn(6, WIDTH), torch.randn(6, WIDTH))]
    before = snapshot(model)
    with pytest.raises(CannotWalk, match=why):
        prune(model, data, F.mse_loss, sparsity=0.5, curvature="layerwise", block_by_block=True, progress=False)
    assert_same(before, snapshot(model))
    assert not any("forward" in vars(module) for module in model.modules())


class Handing(nn.Module):
    """Blocks whose second argument is made by the first block, as the position bias of T5."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(HandingBlock() for _ in range(2))

    def forward(self, x):
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


class HandingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, bias):
        return self.linear(x), x.mean() if bias is None else bias


def test_a_block_that_needs_more_of_another_than_hidden_states_is_refused():
    data = [(torch.randn(6, WIDTH), torch.randn(6, WIDTH))]
    with pytest.raises(CannotWalk, match="blocks.1 is given 2 tensors of what blocks.0 returns"):
        prune(Handing(), data, F.mse_loss, sparsity=0.5, curvature="layerwise", block_by_block=True, progress=False)


class Mixing(Decoder):
    """The head reads the outputs of all blocks."""

    def forward(self, tokens):
        found = []
        handles = [layer.register_forward_hook(lambda *args: found.append(args[2][0])) for layer in self.layers]
        super().forward(tokens)
        for handle in handles:
            handle.remove()
        return self.head(sum(found))


def test_gradients_of_a_loss_that_reads_every_block_are_refused():
    torch.manual_seed(0)
    model, data = Mixing().double(), tokens(8)
    options = {"curvature": "kronecker", "labels": "data", "num_grads": 8, "block_by_block": True}
    with pytest.raises(CannotWalk, match="depend on the blocks of layers other than through the last"):
        pruned(model, data, block_gradients="loss", **options)
    del options["labels"]
    pruned(model, data, **options)  # what blocks are given is right


def test_a_loss_of_the_model_without_labels_is_missed_as_by_the_whole_network():
    options = {"curvature": "fishleg", "sparsity": 0.5, "num_grads": 8, "block_by_block": True, "progress": False}
    data = [{"tokens": x} for x, _ in tokens(8)]
    with pytest.raises(
        ValueError, match="expected a model whose outputs have a loss.*; are the labels among the inputs"
    ):
        prune(decoder(), data, None, block_gradients="loss", **options)
    prune(decoder(), data, None, **options)


class SequenceFirst(nn.Module):
    """Hidden states of the shape [T, N, d]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.mean(0)


def test_hidden_states_without_a_row_for_each_sample_are_refused():
    data = [(torch.randn(6, 3, WIDTH), torch.randn(6, WIDTH))]
    with pytest.raises(CannotWalk, match="the hidden states of layers have no row for each sample"):
        prune(SequenceFirst(), data, F.mse_loss, sparsity=0.5, curvature="layerwise", block_by_block=True)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x += torch.tanh(self.linear(x.clone()))
        return x


def test_blocks_that_work_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(*(InPlace() for _ in range(3))), nn.Linear(WIDTH, 2))
    data = [(torch.randn(20, WIDTH), torch.randn(20, 2))]
    whole, walked = copy.deepcopy(model), copy.deepcopy(model)
    options = {"sparsity": 0.5, "curvature": Layerwise(inputs="dense"), "num_grads": 20, "progress": False}
    result = prune(walked, data, F.mse_loss, block_by_block="1", **options)
    prune(whole, data, F.mse_loss, params=[*result.masks], **options)
    assert_same_weights(walked, whole)


@pytest.mark.parametrize("inputs", ["dense", "sequential"])
@pytest.mark.parametrize("saliency", ["exact", "fixed_order"])
def test_memory_changes_how_often_blocks_are_observed_and_nothing_else(inputs, saliency):
    model, data = decoder(), tokens()
    options = {"curvature": Layerwise(inputs=inputs), "saliency": saliency, "block_by_block": True}
    at_once, _ = pruned(model, data, **options)
    in_parts, _ = pruned(model, data, max_memory=12_000, **options)
    pruner = Pruner(copy.deepcopy(model), **options, max_memory=12_000)
    assert len(pruner.estimator.groups) > 3
    assert len(pruner.estimator.parts) == 3
    assert_same_weights(at_once, in_parts)


class Interrupted(LayerwiseEstimate):
    def blocks(self, name):
        if name.startswith("layers.2."):
            raise KeyboardInterrupt
        return super().blocks(name)


def test_a_pruning_that_was_interrupted_wants_a_new_estimate():
    model, data = decoder(), tokens()
    before = snapshot(model)
    recipe = with_estimate(Layerwise, Interrupted)()
    pruner = Pruner(model, curvature=recipe, block_by_block=True, num_grads=SAMPLES, progress=False)
    pruner.estimate(data, next_token)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune_to(0.5)
    assert_same(before, snapshot(model))
    with pytest.raises(RuntimeError, match="call estimate"):
        pruner.prune_to(0.5)


def test_nothing_is_held_after_a_pruning_of_one_block():
    pruner = Pruner(
        decoder(), curvature="layerwise", block_by_block=True, params="layers.0.up.weight", num_grads=8, progress=False
    )
    pruner.estimate(tokens(8), next_token)
    pruner.prune_to(0.5)
    assert pruner.estimator.walk is None


@pytest.mark.parametrize("size", [64, 16, 1])
@pytest.mark.parametrize("padded_first", [False, True])
def test_masks_that_are_there_for_padded_batches_alone(size, padded_first):
    """As models of transformers make them; unpadded batches have none."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes)).double()
    ids = torch.randint(VOCABULARY, (96, 6))
    mask = torch.ones_like(ids)
    mask[48:, :3] = 0  # on the left
    if padded_first:
        mask = mask.flip(0)
    data = [
        {"input_ids": x, "attention_mask": m, "labels": x.masked_fill(m == 0, -100)}
        for x, m in zip(ids.split(size), mask.split(size), strict=True)
    ]
    for options in (
        {"curvature": Layerwise(inputs="dense")},
        {"curvature": Kronecker(labels="data"), "block_gradients": "loss"},
    ):
        whole, walked = copy.deepcopy(model), copy.deepcopy(model)
        common = {"sparsity": 0.5, "num_grads": 96, "progress": False, "scope": "layer"} | options
        result = prune(walked, data, None, block_by_block=True, **common)
        common.pop("block_gradients", None)
        prune(whole, data, None, params=[*result.masks], **common)
        assert_same_weights(walked, whole, rtol=1e-6, atol=1e-9)


def test_finding_blocks():
    model = nn.ModuleDict(
        {
            "few": nn.ModuleList(nn.Linear(2, 2) for _ in range(2)),
            "many": nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)),
            "mixed": nn.Sequential(nn.Linear(9, 9), nn.ReLU()),
        }
    )
    weights = [name for name, _ in model.named_parameters()]
    found = find_blocks(model, weights)
    assert (found.name, [*found.modules]) == ("many", ["many.0", "many.1", "many.2"])
    assert found.of("many.1.0.weight") == "many.1"
    assert found.of("few.1.weight") is None
    assert find_blocks(model, weights, "few").name == "few"
    assert find_blocks(model, ["few.0.weight"]).name == "few"
    with pytest.raises(ValueError, match=r"got 'mixed'; there are few, many"):
        find_blocks(model, weights, "mixed")
    with pytest.raises(ValueError, match="found none; block_by_block= takes its name"):
        find_blocks(nn.Linear(2, 2), ["weight"])
    model["many"][1][0].weight = model["many"][0][0].weight
    with pytest.raises(ValueError, match=r"many.1.0.weight is a parameter of many.0 as well"):
        find_blocks(model, weights)
    model["few"][1] = model["few"][0]
    with pytest.raises(ValueError, match="few holds a block several times"):
        find_blocks(model, weights, "few")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "identity"}, "Identity, which observes nothing"),
        ({"curvature": "layerwise", "scope": "global"}, "cannot be combined with one threshold for all"),
        ({"curvature": "kronecker", "scope": "global"}, "block_gradients='loss'"),
        ({"curvature": "layerwise", "block_gradients": "loss"}, "observes inputs alone"),
        ({"curvature": "kronecker", "labels": "data"}, "labels and likelihood are of the network's loss"),
        ({"curvature": "kronecker", "first_order": True}, "first_order cannot be combined"),
        ({"curvature": "kronecker", "grad_batch_size": 2}, "grad_batch_size=2 cannot be combined"),
        ({"curvature": FishLeg(passes=2), "block_gradients": "loss"}, "several passes"),
        ({"curvature": "layerwise", "block_by_block": False, "offload": True}, "settings of block_by_block"),
        (
            {"curvature": "layerwise", "params": ["layers.0.up.weight", "head.weight"]},
            "within the blocks of layers, got embedding.weight",
        ),
        ({"curvature": "layerwise", "block_by_block": "head"}, "expected the name of an nn.ModuleList"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pruned(decoder(), tokens(8), **{"block_by_block": True, "num_grads": 8} | options)


def test_an_error_in_a_block_leaves_the_network_as_it_was():
    model, data = decoder(), tokens()
    with torch.no_grad():
        model.layers[2].up.weight[:] = 1e200  # whose inputs to `down` are infinite squared
    before = snapshot(model)
    options = {"sparsity": 0.5, "curvature": "layerwise", "num_grads": SAMPLES, "progress": False}
    with pytest.raises(Exception, match=r"layers.2.down"):
        prune(model, data, next_token, block_by_block=True, **options)
    assert_same(before, snapshot(model))
    assert not any("forward" in vars(module) for module in model.modules())


def test_hidden_states_are_held_once_whatever_the_number_of_blocks():
    model = decoder()
    walk = BlockWalk(model, find_blocks(model, of_blocks(model)), device=CPU, seed=0, held_on=CPU)
    walk.start(chunks(tokens(), 64, SAMPLES, CPU))
    assert walk.samples == SAMPLES
    for index in range(3):
        assert walk.position == index
        assert [held.hidden.shape for held in walk._held] == [(64, LENGTH, WIDTH), (6, LENGTH, WIDTH)]
        assert not any(held.inputs or held.gradients for held in walk._held)
        walk.advance()
