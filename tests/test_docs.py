"""What README and the docs show runs, and what they link to is there."""

import re
import subprocess
import sys

import host
import pytest
import torch
from torch import nn

import fishleg_ext
from fishleg_ext.bench.studies import tables

DOCS = host.ROOT / "docs"
PAGES = [host.ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLE = re.compile(r"```python\n(.*?)```", re.S)


class Net(nn.Module):
    """With the names that the docs use."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.fc, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc(self.norm(self.conv1(x)).relu().flatten(1)).relu())


@pytest.fixture
def names(generator):
    """What examples may take as given."""
    torch.manual_seed(0)
    model = Net().eval()
    images, targets = torch.randn(64, 1, 4, 4, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    dataset = torch.utils.data.TensorDataset(images, targets)
    data = [dataset[:32], dataset[32:]]
    return {
        "fishleg_ext": fishleg_ext,
        "model": model,
        "data": data,
        "loader": torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True),
        "loss_fn": nn.functional.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9),
        "result": fishleg_ext.prune(model, data, sparsity=0.1, num_grads=16, progress=False),
        "K": 2,
        "B": 4,
        "gram": torch.eye(4).repeat(2, 1, 1),
        "chunks": [torch.randn(8, 2, 4, generator=generator)],
        "num_grads": 8,
        "weight": torch.ones(2, 4),
        "alive": torch.ones(2, 4, dtype=torch.bool),
    }


def language_model():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **size))
    ids = torch.randint(0, 11, (64, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return {"torch": torch, "llama": llama, "stories": [{"input_ids": row, "labels": row} for row in ids]}


def tiny_checkpoint(folder):
    """A Llama of two layers and a tokenizer of words, as `from_pretrained` loads them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = ["<pad>", "<s>", "a", "once", "there", "was", "cat", "dog", "and"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")
    fast.save_pretrained(folder)
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "initializer_range": 0.5}  # with 0.02 attention is uniform to rounding
    config = transformers.LlamaConfig(vocab_size=len(words), tie_word_embeddings=True, **size)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (64,), generator=draw).tolist()
    texts = [" ".join(words[int(i)] for i in torch.randint(2, 9, (n,), generator=draw)) for n in lengths]
    return {"checkpoint": folder, "texts": texts}


@pytest.mark.filterwarnings("ignore:the data ended after")
@pytest.mark.filterwarnings("ignore:.* damping 1e-06 is less than rounding may have left")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(host.ROOT)))
def test_examples_run_one_after_the_other(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.name == "other-models.md":
        names |= language_model()
    if page.name == "transformers.md":
        names |= tiny_checkpoint(tmp_path / "checkpoint")
    examples = EXAMPLE.findall(page.read_text())
    for number, example in enumerate(examples):
        exec(compile(example, f"{page.name}, example {number}", "exec"), names)
    if page.name == "transformers.md":
        again = type(names["model"]).from_pretrained("pruned")
        for name, weight in names["model"].named_parameters():
            assert torch.equal(weight, again.get_parameter(name))
        assert len(names["result"].masks) == 14
        assert names["result"].sparsity == 0.5
        for name in names["result"].masks:
            rows = names["dense"].get_parameter(name).unflatten(1, (-1, 4))
            assert ((rows != 0).sum(2) <= 2).all()
            assert (names["whole"].get_parameter(name) == 0).any()
    if page.name == "README.md":
        assert len(examples) == 5
        assert names["result"].sparsity == pytest.approx(0.95, abs=0.01)
        assert (names["rank"] < 2).sum() == (names["weight"] == 0).sum() == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(host.ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_its_table_is_that_of_the_results():
    text = (host.ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert f"<!-- table: readme -->\n\n{tables.TABLES['readme']()}\n" in text


def test_every_table_of_the_docs_is_made():
    wanted = {name for page in PAGES for name in re.findall(r"\{\{ (\w+) \}\}", page.read_text())}
    assert wanted - {"settings"} == set(tables.TABLES) - {"readme"}
    for name in wanted - {"settings"}:
        table = tables.TABLES[name]()
        assert table.count("|") > 20, name
        assert not re.search(r"\bnan\b", table), name
    done = subprocess.run([sys.executable, tables.__file__, "first_order"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tables.TABLES["first_order"]()
