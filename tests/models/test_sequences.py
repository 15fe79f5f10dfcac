"""Likelihoods of sequences: what is drawn and what counts as a sample, against the dense Fisher matrix."""

import copy
from dataclasses import dataclass

import pytest
import torch
from recorder import Recorder
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.observation.observe import observe

WIDTH, VOCABULARY, LENGTH = 3, 4, 4


@dataclass
class Outputs:
    """As those of models of transformers."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class Tiny(nn.Module):
    """A language model with a loss of its own, of one matrix [4, 3] that is to be pruned.

    Args:
        shift: whether logits are for the token after, as in a causal model.
    """

    def __init__(self, shift):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.shift = shift

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.embedding(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = torch.tanh((hidden * mask[..., None]).cumsum(1))
        logits, loss = self.head(hidden), None
        if labels is not None:
            z, t = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
            loss = F.cross_entropy(z.flatten(0, 1), t.flatten())
        return Outputs(loss=loss, logits=logits, last_hidden_state=hidden)


def batch(kind, generator):
    """Six sequences: whole, padded, with a prompt that is not learned, or with some tokens that are masked."""
    tokens = torch.randint(VOCABULARY, (6, LENGTH), generator=generator)
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    if kind == "padded":
        mask[::2, 2:] = 0
        labels = labels.masked_fill(mask == 0, -100)
    if kind == "prompts":
        labels[:, :2] = -100
    if kind == "masked":
        labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.5, -100)
        labels[:, 0] = tokens[:, 0]
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def fisher_by_hand(model, data):
    """Mean over sequences of the Fisher matrix of the mean over predicted tokens, a sum over classes, [12, 12].

    The gradient of the mean of t independent terms has a square of Fisher / t, of which each term has Fisher: samples
    are sequences, scaled so that a sequence counts as the mean of its tokens, however many these are.
    """
    total = torch.zeros(VOCABULARY * WIDTH, VOCABULARY * WIDTH, dtype=torch.float64)
    outputs = model(data["input_ids"], data["attention_mask"])
    for s in range(len(data["input_ids"])):
        known = [t for t in range(LENGTH) if data["labels"][s, t] != -100 and not (model.shift and t == 0)]
        for t in known:
            x, z = (y[s, t - 1 if model.shift else t] for y in (outputs.last_hidden_state, outputs.logits))
            p = z.softmax(0)
            total += torch.kron(p.diag() - torch.outer(p, p), torch.outer(x, x)) / len(known)
    return total / len(data["input_ids"])


@pytest.mark.parametrize(
    ("kind", "shift"), [("whole", True), ("padded", True), ("prompts", True), ("masked", False), ("whole", False)]
)
@pytest.mark.parametrize("wanted", ["gradients", "gradients one by one"])
def test_drawn_tokens_give_the_fisher_matrix_of_the_mean_token(kind, shift, wanted, generator):
    model = Tiny(shift).double().eval()
    data = batch(kind, generator)
    expected = fisher_by_hand(model, data).detach()
    draws = 400
    size = 6 if wanted == "gradients" else 1
    repeated = [{key: x[i : i + size] for key, x in data.items()} for _ in range(draws) for i in range(0, 6, size)]
    recorder = Recorder()
    weights = {"head.weight": model.head.weight}
    count = observe(model, repeated, None, recorder, weights, num_grads=6 * draws, labels="model")
    assert count == 6 * draws  # one for each sequence
    g = recorder.gradients("head.weight").flatten(1)
    found = g.mT @ g / len(g)
    assert float((found - expected).norm() / expected.norm()) < 0.1  # of the order of draws^-1/2


def test_gradients_of_the_data_are_those_of_each_sequence_alone(generator):
    model = Tiny(True).double().eval()
    data = batch("padded", generator)
    recorder = Recorder()
    weights = {"head.weight": model.head.weight}
    observe(model, [data], None, recorder, weights, num_grads=6)
    found = recorder.gradients("head.weight")
    for s in range(6):
        loss = model(**{key: x[s : s + 1] for key, x in data.items()}).loss
        (own,) = torch.autograd.grad(loss, model.head.weight)
        torch.testing.assert_close(found[s], own)


class Another(Tiny):
    """A model whose own loss is nearly the mean cross entropy."""

    def __init__(self, how):
        super().__init__(True)
        self.how = how

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask, labels)
        z, t = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        if self.how == "penalty":
            outputs.loss = outputs.loss + 1e-3 * self.head.weight.square().sum()
        elif self.how == "smoothing":
            outputs.loss = F.cross_entropy(z, t, label_smoothing=0.1)
        else:
            outputs.loss = F.cross_entropy(z, t, ignore_index=0)
        return outputs


@pytest.mark.parametrize("how", ["penalty", "smoothing", "ignored"])
@pytest.mark.parametrize("curvature", ["diagonal", "block", "kronecker"])
def test_a_loss_that_is_nearly_the_cross_entropy_is_taken_as_it_is(how, curvature, generator, recwarn):
    model = Another(how).double().eval()
    with torch.no_grad():
        model.head.weight *= 1e-3  # a network that knows nothing, of which all losses are about the same
    data = batch("whole", generator)
    recorder = Recorder()
    observe(model, [data], None, recorder, {"head.weight": model.head.weight}, num_grads=6)
    for s in range(6):
        loss = model(**{key: x[s : s + 1] for key, x in data.items()}).loss
        (own,) = torch.autograd.grad(loss, model.head.weight)
        torch.testing.assert_close(recorder.gradients("head.weight")[s], own)


def test_targets_that_turn_out_to_be_left_out_in_a_later_batch_are_an_error(generator):
    model = Another("ignored").double().eval()
    x = torch.randint(1, VOCABULARY, (128, LENGTH), generator=generator)
    x[64:, 2] = 0
    data = [{"input_ids": part, "labels": part} for part in x.split(64)]
    options = {"curvature": "kronecker", "labels": "data", "params": ["head.weight"], "num_grads": 128}
    with pytest.raises(ValueError, match=r"in the first batch, but not in a later one.*ignore_index"):
        fishleg_ext.prune(copy.deepcopy(model), data, None, sparsity=0.5, progress=False, **options)
    recorder = Recorder()  # gradients can do without factors, by the loss that the model returns
    observe(model, data, None, recorder, {"head.weight": model.head.weight}, num_grads=128)
    loss = model(**{key: part[:1] for key, part in data[1].items()}).loss
    (own,) = torch.autograd.grad(loss, model.head.weight)
    torch.testing.assert_close(recorder.gradients("head.weight")[64], own)


class Config:
    is_encoder_decoder = True


def test_the_mask_of_an_encoder_does_not_count_for_its_decoder(generator):
    model = Embeds(Encoder()).double()
    model.config = Config()
    data = batch("padded", generator)
    inputs = {key: data[key] for key in ("input_ids", "attention_mask")}
    options = {"curvature": "layerwise", "params": ["encoder.dense.weight"], "num_grads": 6, "sparsity": 0.5}
    costs = []
    for masked in (True, False):
        tried = copy.deepcopy(model)
        if not masked:
            tried.forward = lambda tokens, tried=tried: Embeds.forward(tried, tokens, inputs["attention_mask"][:1])
        given = inputs if masked else inputs["input_ids"]
        costs.append(fishleg_ext.prune(tried, [(given, None)], F.mse_loss, progress=False, **options))
    assert costs[0].predicted_loss_increase > 0
    assert costs[0].predicted_loss_increase == pytest.approx(costs[1].predicted_loss_increase)


def test_packed_sequences_are_one_sample(generator):
    """Two stories in one row count as one gradient, of the mean over all of its predicted tokens."""
    model = Tiny(True).double().eval()
    data = batch("whole", generator)
    data["labels"] = data["labels"].index_fill(1, torch.tensor([2]), -100)  # the second begins here
    recorder = Recorder()
    observe(model, [data], None, recorder, {"head.weight": model.head.weight}, num_grads=6)
    found = recorder.gradients("head.weight")
    assert len(found) == 6
    for s in range(6):
        logits = model(data["input_ids"][s : s + 1]).logits[0, [0, 2]]  # that predict tokens 1 and 3
        (own,) = torch.autograd.grad(F.cross_entropy(logits, data["input_ids"][s, [1, 3]]), model.head.weight)
        torch.testing.assert_close(found[s], own)
        assert own.any()


class Embeds(nn.Module):
    """The mean over tokens, and no head."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        kept = attention_mask[..., None]
        return (hidden * kept).sum(1) / kept.sum(1)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.dense = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 2, bias=False)

    def forward(self, input_ids, attention_mask=None):
        return Outputs(last_hidden_state=self.dense(self.embedding(input_ids)))


@pytest.mark.parametrize("form", ["pairs", "mappings"])
def test_an_encoder_without_a_head_and_without_labels_has_a_gaussian_likelihood(form, generator):
    model = Embeds(Encoder()).double().eval()
    inputs = {key: batch("padded", generator)[key] for key in ("input_ids", "attention_mask")}
    kept = inputs["attention_mask"][..., None]
    means = (model.encoder.embedding(inputs["input_ids"]) * kept).sum(1) / kept.sum(1)  # y = W mean
    expected = torch.kron(torch.eye(2), 2 / 2 * (means.mT @ means) / 6).detach()  # (y - mean)^2, a mean over 2 outputs
    data = [(inputs, None) if form == "pairs" else inputs] * 400
    recorder = Recorder()
    weights = {"encoder.dense.weight": model.encoder.dense.weight}
    observe(model, data, F.mse_loss, recorder, weights, num_grads=2400, labels="model", likelihood="gaussian")
    g = recorder.gradients("encoder.dense.weight").flatten(1)
    assert float((g.mT @ g / len(g) - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("curvature", ["layerwise", "layerwise_diagonal", "kronecker", "fishleg", "block"])
def test_padding_counts_for_nothing(curvature, generator):
    data = batch("padded", generator)
    inputs = {key: data[key] for key in ("input_ids", "attention_mask")}
    alone = []
    for s in range(6):
        length = int(inputs["attention_mask"][s].sum())
        alone.append(({key: x[s : s + 1, :length] for key, x in inputs.items()}, torch.ones(1, 2).double()))
    options = {"curvature": curvature, "params": ["encoder.dense.weight"], "num_grads": 6, "sparsity": 0.5}
    options |= {} if curvature.startswith("layerwise") else {"labels": "data"}
    costs = []
    for given in ([(inputs, torch.ones(6, 2).double())], alone):
        model = copy.deepcopy(Embeds(Encoder()).double())
        costs.append(fishleg_ext.prune(model, given, F.mse_loss, progress=False, **options).predicted_loss_increase)
    assert costs[0] > 0
    assert costs[0] == pytest.approx(costs[1], rel=1e-9)
