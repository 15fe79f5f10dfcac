"""Small networks of other people's libraries and of this field's usual shapes, at most 20,000 weights each."""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

SAMPLES, LENGTH, VOCABULARY, CLASSES = 6, 5, 13, 3


@dataclass(frozen=True)
class Case:
    """A model with a batch of data for it.

    Attributes:
        model, inputs, targets, loss_fn: as `prune` takes them.
        refused: name of a parameter of which inputs cannot be observed, and a part of the reason; None where all can.
    """

    model: nn.Module
    inputs: Any
    targets: Any
    loss_fn: Any = F.cross_entropy
    refused: tuple[str, str] | None = None


ZOO: dict[str, Callable[[], Case]] = {}


def case(function):
    """Add a case by its name; the model in float64 and eval mode, its parameters of ordinary size."""

    @functools.wraps(function)
    def made():
        torch.manual_seed(0)
        made = function()
        made.model.double().eval()
        with torch.no_grad():
            for parameter in made.model.parameters():
                if parameter.dim() > 1:  # pretrained ones are not as small as many are at first
                    parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)
        return made

    ZOO[function.__name__] = made
    return made


def classes(n=SAMPLES):
    return torch.randint(0, CLASSES, (n,))


def tokens():
    return torch.randint(0, VOCABULARY, (SAMPLES, LENGTH))


def images(size=16, channels=3):
    return torch.randn(SAMPLES, channels, size, size, dtype=torch.float64)


def sequence():
    return torch.randn(SAMPLES, LENGTH, 8, dtype=torch.float64)


def next_token_loss(outputs, targets):
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def logits_loss(outputs, targets):
    return F.cross_entropy(outputs.logits, targets)


def hf(name, **config):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config_class = getattr(transformers, config.pop("config"))
    return getattr(transformers, name)(config_class(**config))


def language_model(name, **config):
    x = tokens()
    return Case(hf(name, vocab_size=VOCABULARY, **config), {"input_ids": x}, x, next_token_loss)


class _Anything(type):
    """A class that has every attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return anything(name)


@functools.cache
def anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {"__init__": lambda self, *_, **options: None})


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for torchvision, whose transforms timm imports, and whose wheel does not fit every build of torch."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = anything
        return module

    def exec_module(self, module):
        pass


def timm_module(name):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    stand_in = NoTorchvision()
    sys.meta_path.insert(0, stand_in)
    try:
        return importlib.import_module(f"timm.{name}")
    finally:  # before others ask whether it is there
        sys.meta_path.remove(stand_in)
        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]


def timm_model(name, size=32, **options):
    return Case(timm_module("models").create_model(name, num_classes=CLASSES, **options), images(size), classes())


def classifier(*body, channels):
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class Pooled(nn.Module):
    """The mean over positions of what a sequence model returns, and a classifier."""

    def __init__(self, body, size=8):
        super().__init__()
        self.body, self.head = body, nn.Linear(size, CLASSES)

    def forward(self, x):
        y = self.body(x)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


DECODER = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@case
def llama():
    return language_model("LlamaForCausalLM", config="LlamaConfig", **DECODER)


@case
def gpt2():
    size = {"n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    return language_model("GPT2LMHeadModel", config="GPT2Config", **size)


@case
def gpt_neox():
    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return language_model("GPTNeoXForCausalLM", config="GPTNeoXConfig", **size, bos_token_id=0, eos_token_id=1)


@case
def bert():
    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf("BertForSequenceClassification", config="BertConfig", vocab_size=VOCABULARY, num_labels=CLASSES, **size)
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    mask[::2, -2:] = 0
    return Case(model, {"input_ids": tokens(), "attention_mask": mask}, classes(), logits_loss)


@case
def t5():
    size = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    model = hf("T5ForConditionalGeneration", config="T5Config", vocab_size=VOCABULARY, **size)
    loss = lambda outputs, targets: F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())
    return Case(model, {"input_ids": tokens(), "decoder_input_ids": tokens()}, tokens(), loss)


@case
def vit():
    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf("ViTForImageClassification", config="ViTConfig", image_size=8, patch_size=4, num_labels=CLASSES, **size)
    return Case(model, {"pixel_values": images(8)}, classes(), logits_loss)


@case
def gemma2():
    """Layers that are given masks of their own, sliding or not."""
    options = {"head_dim": 4, "sliding_window": 3, "query_pre_attn_scalar": 4}
    return language_model("Gemma2ForCausalLM", config="Gemma2Config", **DECODER | options)


@case
def mixtral():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return language_model("MixtralForCausalLM", config="MixtralConfig", **DECODER | experts, tie_word_embeddings=False)


@case
def mamba():
    size = {
        "hidden_size": 8,
        "state_size": 4,
        "num_hidden_layers": 1,
        "conv_kernel": 3,
        "expand": 2,
        "use_mambapy": False,
    }
    return language_model("MambaForCausalLM", config="MambaConfig", **size)


@case
def wav2vec2():
    size = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "conv_dim": (8,),
        "conv_stride": (4,),
        "conv_kernel": (4,),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 8,
        "num_labels": CLASSES,
        "apply_spec_augment": False,
        "feat_extract_norm": "layer",
    }
    model = hf("Wav2Vec2ForSequenceClassification", config="Wav2Vec2Config", **size)
    x = torch.randn(SAMPLES, 48, dtype=torch.float64)
    return Case(model, {"input_values": x}, classes(), logits_loss)


@case
def resnet():
    return timm_model("resnet18", block_args={}, channels=(4, 4, 8, 8), layers=(1, 1, 1, 1), size=32, stem_width=4)


@case
def convnext():
    return timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8))


@case
def swin():
    return timm_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 2),
    )


@case
def efficientnet_same_padding():
    blocks, layers = timm_module("models._efficientnet_blocks"), timm_module("layers")
    excite = functools.partial(blocks.SqueezeExcite, rd_ratio=0.5)
    inverted = blocks.InvertedResidual(4, 8, stride=2, pad_type="same", exp_ratio=2, se_layer=excite)
    body = classifier(layers.create_conv2d(3, 4, 3, stride=2, padding="same"), inverted, channels=8)
    assert any(isinstance(module, layers.Conv2dSame) for module in body.modules())
    return Case(body, images(8), classes())


@case
def mobilenet():
    blocks = timm_module("models._efficientnet_blocks")
    separable = blocks.DepthwiseSeparableConv(4, 4, act_layer=nn.Hardswish)
    inverted = blocks.InvertedResidual(4, 8, dw_kernel_size=5, exp_ratio=2, act_layer=nn.Hardswish)
    return Case(classifier(nn.Conv2d(3, 4, 3), separable, inverted, channels=8), images(8), classes())


@case
def nfnet():
    nfnet = timm_module("models.nfnet")
    config = nfnet._nfres_cfg(depths=(1, 1, 1, 1), channels=(8, 8, 16, 16))
    model = nfnet.NormFreeNet(config, num_classes=CLASSES)
    return Case(model, images(32), classes(), refused=("stem.conv.weight", "batch_norm"))


@case
def mlp_mixer():
    model = timm_module("models.mlp_mixer").MlpMixer
    return Case(model(CLASSES, img_size=8, patch_size=4, num_blocks=1, embed_dim=8), images(8), classes())


@case
def lstm():
    return Case(Pooled(nn.LSTM(8, 4, batch_first=True, bidirectional=True)), sequence(), classes())


@case
def transformer_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return Case(Pooled(nn.TransformerEncoder(layer, 2)), sequence(), classes())


@case
def attention():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2)

        def forward(self, x):  # [T, N, d] inside; queries are half of the positions
            x = x.transpose(0, 1)
            return self.attend(x[:2], x, x, need_weights=False)[0].transpose(0, 1)

    return Case(Pooled(Cross()), sequence(), classes())


@case
def attention_of_other_sizes():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)

        def forward(self, x):
            return self.attend(x, x[..., :4], x[..., 4:], need_weights=False)[0]

    return Case(Pooled(Cross()), sequence(), classes())


@case
def unet():
    class Unet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
            self.out = nn.Conv2d(9, CLASSES, 1)

        def forward(self, x):
            return self.out(torch.cat([self.up(self.down(x).relu()), x], dim=1))

    return Case(Unet(), images(8), torch.randint(0, CLASSES, (SAMPLES, 8, 8)))


@case
def depthwise_3d():
    body = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.GELU(),
        nn.Conv3d(4, 4, (1, 2, 2), groups=4),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )
    return Case(body, torch.randn(SAMPLES, 2, 3, 4, 4, dtype=torch.float64), classes())


@case
def siamese():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x[:, 0])) * torch.tanh(self.body(x[:, 1:])).sum(1))

    return Case(Siamese(), sequence(), classes())


@case
def low_rank_adapter():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    adapted = peft.get_peft_model(Pooled(body), peft.LoraConfig(r=2, target_modules=["body.0"]))
    return Case(adapted, sequence(), classes())


@case
def graph_convolution():
    class Graphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.empty(6, 8)), nn.Linear(6, CLASSES)

        def forward(self, nodes, edges):  # dense adjacency
            return self.second(torch.einsum("nij,njc,oc->nio", edges.softmax(2), nodes, self.first).relu().mean(1))

    edges = torch.randn(SAMPLES, LENGTH, LENGTH, dtype=torch.float64)
    return Case(Graphs(), (sequence(), edges), classes(), refused=("first", "more than one other tensor"))


@case
def weight_standardisation():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std(
                (1, 2, 3), keepdim=True
            )
            return F.conv2d(x, weight, self.bias)

    body = nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES))
    return Case(body, images(4), classes(), refused=("0.weight", "mean, sub"))
