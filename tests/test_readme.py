"""What README shows runs."""

import re

import host
import pytest
import torch
from torch import nn

import fishleg_ext


class Net(nn.Module):
    """With the names that README uses."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.fc, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc(self.norm(self.conv1(x)).relu().flatten(1)).relu())


@pytest.mark.filterwarnings("ignore:the data ended after")
def test_the_examples(tmp_path, monkeypatch, generator):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Net().eval()
    images, targets = torch.randn(64, 1, 4, 4, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    dataset = torch.utils.data.TensorDataset(images, targets)
    names = {
        "fishleg_ext": fishleg_ext,
        "torch": torch,
        "model": model,
        "data": [dataset[:32], dataset[32:]],
        "loader": torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True),
        "loss_fn": nn.functional.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9),
    }
    of_ops = {"K": 2, "B": 4, "chunks": [torch.randn(8, 2, 4, generator=generator)], "num_grads": 8}
    names |= of_ops | {"weight": torch.ones(2, 4), "alive": torch.ones(2, 4, dtype=torch.bool)}
    examples = re.findall(r"```python\n(.*?)```", (host.ROOT / "README.md").read_text(), re.S)
    assert len(examples) == 7
    for example in examples:  # one after the other, as at a prompt
        exec(example, names)
    assert names["result"].sparsity == pytest.approx(0.95, abs=0.01)
    assert (names["rank"] < 2).sum() == (names["weight"] == 0).sum() == 4
    assert {"loss.png", "run.safetensors"} <= {path.name for path in tmp_path.iterdir()}
