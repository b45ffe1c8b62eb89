"""What several test files share: small random networks, made the same way every time."""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the oracles must not look for a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what commands do on a CPU is tested, whatever the machine; see test_gpu.py

from dataclasses import replace

import pytest
import torch
from hypothesis import settings

from yojo.core.config import Config, ConnectorConfig, TextConfig, VisionConfig
from yojo.core.molmo2 import Molmo2
from yojo.core.prompt import Processor
from yojo.initial import init_weights

torch.set_num_threads(2)

# What `hypothesis` makes up: 200 cases of every property, or more with --hypothesis-profile=thousands or long.
for profile, cases in (("usual", 200), ("thousands", 2000), ("long", 10_000)):
    settings.register_profile(profile, max_examples=cases, deadline=None)
settings.load_profile("usual")

TINY = Config(
    TextConfig(32, 2, 4, 2, 8, 48, 400, 24, 4096, 10000.0),
    VisionConfig(24, 3, 2, 12, 40, 14, 36),
    ConnectorConfig(24, 2, 8, 24, (-1, -3)),
    image_patch_id=407,
    eos_ids=(399,),
    pad_id=0,
)


def random_model(config: Config = TINY, seed: int = 0, dtype=torch.float64, std: float = 0.2) -> Molmo2:
    """Weights large enough that attention is far from uniform: an error in a mask must show."""
    model = Molmo2(config)
    init_weights(model, torch.Generator().manual_seed(seed), std)
    return model.to(dtype).requires_grad_(False).eval()


@pytest.fixture
def tiny_config() -> Config:
    return TINY


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random tiny checkpoint with a real tokenizer and processor files."""
    from yojo.pretrain import write_companions
    from yojo.weights import save_backbone

    companions = tmp_path_factory.mktemp("companions")
    processor = write_companions(companions)
    tokenizer = processor.tokenizer
    text = replace(TINY.text, vocab_size=512, additional_vocab_size=16)
    ids = {"image_patch_id": tokenizer.id("<im_patch>"), "eos_ids": (tokenizer.id("<|im_end|>"),)}
    save_backbone(
        random_model(replace(TINY, text=text, **ids), dtype=torch.float32), companions.parent / "base", companions
    )
    return companions.parent / "base"


@pytest.fixture(scope="session")
def processor(tiny_folder):
    """The tokenizer and settings of that checkpoint."""
    return Processor.from_folder(tiny_folder, TINY.text.max_position_embeddings)


def names(processor, encoded) -> list[str]:
    """A row in words."""
    return [processor.tokenizer.name(token) for token in encoded.ids.tolist()]


def edit(path, change) -> None:
    """A JSON file with something changed."""
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process -> (exit status, stdout, stderr)."""

    def call(module, *words):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        status = 0
        try:
            module.main()
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return call
