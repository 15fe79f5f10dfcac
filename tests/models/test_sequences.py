"""Likelihoods of sequences: what is drawn and what counts as a sample, against the dense Fisher matrix."""

import copy

import pytest
import torch
from recorder import Recorder
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.observation.observe import observe

WIDTH, VOCABULARY, LENGTH = 3, 4, 4


class Outputs(dict):
    """As the outputs of models of transformers: entries that are attributes too."""

    __getattr__ = dict.get


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


def test_packed_sequences_are_one_sample(generator):
    """Two stories in one row count as one gradient, of the mean over all of its predicted tokens."""
    model = Tiny(True).double().eval()
    data = batch("whole", generator)
    data["labels"] = data["labels"].index_fill(1, torch.tensor([2]), -100)  # the second begins here
    recorder = Recorder()
    observe(model, [data], None, recorder, {"head.weight": model.head.weight}, num_grads=6)
    assert len(recorder.gradients("head.weight")) == 6


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
    assert costs[0] == pytest.approx(costs[1], rel=1e-9)
