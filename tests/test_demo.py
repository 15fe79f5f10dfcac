"""The demo's parts; `make demo` runs the whole."""

import json

import pytest
import torch

from fishleg_ext import demo


def test_data_is_split_without_overlap_and_network_is_reproducible():
    training, test = demo.digits()
    assert len(training.images) + len(test.images) == 1797
    assert training.images.shape[1:] == (1, 8, 8)
    assert 0 <= float(training.images.min()) <= float(training.images.max()) <= 1
    first, again = demo.network(3).state_dict(), demo.network(3).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in first.items())


def test_a_short_run_writes_table_numbers_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SPARSITIES", (0.5, 0.8))
    options = {name: o | {"num_grads": 64} for name, o in demo.METHODS.items()}
    monkeypatch.setattr(demo, "METHODS", options)
    train = demo.train
    monkeypatch.setattr(demo, "train", lambda *args, **kwargs: train(*args, epochs=4, **kwargs))
    results = demo.run(tmp_path, progress=False)
    assert json.loads((tmp_path / "digits.json").read_text()) == results
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert results["dense_accuracy"] > 90
    assert results["accuracies"]["exact greedy"][0] > 80
    assert results["accuracies"]["exact greedy"][1] > results["accuracies"]["magnitude"][1]
    out = capsys.readouterr().out
    assert all(method in out for method in demo.METHODS)


def test_the_table_reads_as_one():
    results = {"sparsities": [0.5], "accuracies": {"magnitude": [12.345]}, "seconds_per_pruning": {"magnitude": 0.5}}
    header, _, row = demo.table(results).splitlines()
    assert header.split() == ["test", "accuracy,", "%", "50%", "s", "each"]
    assert row.split() == ["magnitude", "12.3", "0.50"]


def test_accuracy_counts_right_answers():
    split = demo.Split(torch.zeros(4, 64), torch.tensor([1, 1, 0, 2]))
    assert demo.accuracy(lambda x: torch.tensor([[0.0, 1.0, 0.0]]).expand(len(x), 3), split) == pytest.approx(50)
