"""ResNet-20, a wider ResNet-18, and the images of CIFAR-10."""

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = r"re:(conv\d|linear)\.weight$"


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.stride, self.padding = stride, (fan_out - fan_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Add both paths."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))

    def skip(self, x: Tensor) -> Tensor:
        """Subsample, and pad channels with zeros."""
        if self.stride == 1:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class ResNet20(nn.Module):
    """He et al. 2016, section 4.2, n = 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 3, 32, 32]."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class ProjectedBlock(Block):
    """The same with a shortcut by a convolution where the shape changes."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__(fan_in, fan_out, stride)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))

    def skip(self, x: Tensor) -> Tensor:
        """Project the inputs to the shape of the outputs."""
        return self.shortcut(x)


class ResNet18(nn.Module):
    """He et al. 2016, table 1, with a stem for images of 32 x 32: 11.2 M weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = [64, 64, 128, 256, 512]
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), start=1):
            blocks = ProjectedBlock(fan_in, fan_out, 1 if i == 1 else 2), ProjectedBlock(fan_out, fan_out, 1)
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 3, 32, 32]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.linear(x.mean((2, 3)))


# Mean and standard deviation of the inputs that each network was trained with.
RESNET20_INPUTS = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
RESNET18_INPUTS = [[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]]


class Cifar10:
    """Normalised training and test images, read from the sheets of a folder."""

    def __init__(self, folder: Path, inputs: list[list[float]] = RESNET20_INPUTS) -> None:
        self.folder, self._inputs = folder, inputs
        self.train_labels = torch.tensor(json.loads((folder / "train_labels.json").read_text()))
        self.test_images = self._sheet("test.webp")
        self.test_labels = torch.tensor(json.loads((folder / "test_labels.json").read_text()))

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _sheet(self, name: str) -> Tensor:
        pixels = np.asarray(Image.open(self.folder / name).convert("RGB"))
        images = pixels.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(10000, 3, 32, 32)
        mean, std = torch.tensor(self._inputs)[:, :, None, None]
        return (torch.from_numpy(images.astype(np.float32)) / 255 - mean) / std

    def training_batches(self, start: int, count: int, size: int = 128) -> list[tuple[Tensor, Tensor]]:
        """Images start to start + count of the training set, in its order."""
        sheets = range(start // 10000, (start + count - 1) // 10000 + 1)
        images = torch.cat([self._sheet(f"train_{i}.webp") for i in sheets])[start - 10000 * sheets[0] :][:count]
        return list(zip(images.split(size), self.train_labels[start : start + count].split(size), strict=True))

    @torch.no_grad()
    def accuracy(self, model: nn.Module, held_out: bool = False) -> float:
        """Right answers on the test set, or on the last 10,000 training images, in percent."""
        model.eval()
        test = list(zip(self.test_images.split(100), self.test_labels.split(100), strict=True))
        batches = self.training_batches(40000, 10000, 100) if held_out else test
        device = next(model.parameters()).device
        right = torch.cat([model(x.to(device)).argmax(1).cpu() == y for x, y in batches])
        return float(right.double().mean()) * 100
