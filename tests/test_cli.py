"""The command line, run as a user does."""

import json
import re
import subprocess
import sys

import pytest
import torch

from fishleg_ext import ops
from fishleg_ext.cli import main
from fishleg_ext.ops.dispatch import OPS

USER_CODE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator))]

def score(model):
    return float(sum(p.abs().sum() for p in model.parameters()))

def not_a_model():
    return 3
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_info_lists_every_op_with_reasons(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name, op in OPS.items():
        line = re.search(rf"^{name} .*$", out, re.M)[0]
        assert "reference" in line
        for impl in op.kernels:
            reason = op.unavailable(impl)
            assert (f"{impl}: {reason}" if reason else f" {impl}, ") in line
    assert f"torch {torch.__version__}" in out
    assert re.search(r"^GPU: ", out, re.M)
    assert re.search(r"^CUDA part: .+", out, re.M)


def test_prune_writes_model_masks_and_report(user, capsys):
    torch.manual_seed(1)
    checkpoint = {k: v + 0.5 for k, v in _model().state_dict().items()}
    torch.save(checkpoint, "dense.pt")
    command = "prune mine:model mine:data --sparsity 0.5 --num-grads 32 --checkpoint dense.pt --out pruned.pt"
    assert main([*command.split(), "--evaluate", "mine:score", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^all +\d+ weights +50.00%", out, re.M)
    assert re.search(r"mine:score: [\d.]+ before, [\d.]+ after", out)
    saved = torch.load("pruned.pt", weights_only=True)
    assert torch.equal(saved["model"]["0.bias"], checkpoint["0.bias"])
    total = 0
    for name, entry in saved["masks"].items():
        mask = ops.unpack_mask(entry["packed"], entry["shape"])
        assert torch.equal(saved["model"][name] != 0, mask)
        total += int((~mask).sum())
    assert total == 36
    report = json.loads((user / "pruned.json").read_text())
    assert report["sparsity"] == 0.5
    assert report["evaluation"]["after"] == pytest.approx(float(sum(v.abs().sum() for v in saved["model"].values())))
    again = "prune mine:model mine:data --sparsity 0 --num-grads 32 --checkpoint pruned.pt --out again.pt --quiet"
    assert main(again.split()) == 0
    reloaded = torch.load("again.pt", weights_only=True)["model"]
    assert all(torch.equal(v, reloaded[k]) for k, v in saved["model"].items())


def _model():
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("mine:model mine:data --sparsity 1.5 --out x.pt", r"sparsity in \[0, 1\), got 1.5"),
        ("mine:nope mine:data --sparsity 0.5 --out x.pt", "module mine has no function nope"),
        ("mine mine:data --sparsity 0.5 --out x.pt", "expected MODULE:FUNCTION, got 'mine'"),
        ("absent:model mine:data --sparsity 0.5 --out x.pt", "No module named 'absent'"),
        ("mine:not_a_model mine:data --sparsity 0.5 --out x.pt", "return an nn.Module, got int"),
        ("mine:model mine:data --sparsity 0.5 --out no/x.pt", "no, does not exist"),
        ("mine:model mine:data --sparsity 0.5 --out x.pt --params 0.wait", "did you mean 0.weight"),
        ("mine:model mine:data --sparsity 0.5 --out x.pt --checkpoint no.pt", "no.pt"),
        ("mine:model mine:data --sparsity 0.5 --out x.json", "overwritten by the report"),
        (
            "mine:model mine:data --sparsity 0.5 --out x.pt --checkpoint mine.py",
            "mine.py is truncated, or no file of torch.save",
        ),
        ("mine:model mine:data --sparsity 0.5 --out x.pt --impl triton --num-grads 8", "no Triton kernel"),
    ],
)
def test_errors_are_one_line_and_status_2(user, capsys, arguments, message):
    assert main(["prune", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("fishleg-ext: ")
    assert "Traceback" not in error
    assert not (user / "x.pt").exists()


def test_debug_shows_the_traceback(user):
    with pytest.raises(ValueError, match="no function nope"):
        main(["--debug", "prune", "mine:nope", "mine:data", "--sparsity", "0.5", "--out", "x.pt"])


def test_the_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "fishleg_ext.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)


def test_scopes_and_shares_on_the_command_line(capsys):
    from fishleg_ext.cli import _parser

    parse = lambda *options: _parser().parse_args(["prune", "m:f", "d:f", "--out", "x.pt", *options])
    assert parse("--scope", "0.weight=0.5,fc.weight=.9").scope == {"0.weight": 0.5, "fc.weight": 0.9}
    assert parse("--scope", "layer").scope == "layer"
    assert parse("--first-order-share", "0.5").first_order == 0.5
    first = _parser().parse_args(["prune", "--first-order", "m:f", "d:f", "--out", "x.pt"])
    assert first.first_order is True
    assert parse("--params", "a", "--params", "re:b").params == ["a", "re:b"]
    assert not parse("--quiet").progress
    assert not hasattr(parse(), "seed")  # what is not given is the config's default
    for wrong in (["--scope", "a=b"], ["--curvatur", "diagonal"], ["--labels", "both"]):
        with pytest.raises(SystemExit):
            parse(*wrong)
    assert "expected NAME=SPARSITY,NAME=SPARSITY, got 'a=b'" in capsys.readouterr().err
