"""Tiny models of real architectures, made on the fly, and the tokenizers that go with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: threads of their own would only collide

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from architectures import MAKERS
from shl.core.models import Loaded, load

STORIES = Path(__file__).parent.parent.parent / "shared" / "models" / "stories260K"

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE

_TEXT = [
    "The guard said that the order came from above, and nobody asked why.",
    "She helped the old man across the road; he thanked her twice.",
    "Answer in JSON with one digit: 0, 1, 2, 3, 4, 5 or 6.",
    "You are a person who cares about others more than about rules.",
    "You are a person who follows orders and respects the law.",
]
_SPECIAL = ["<pad>", "<bos>", "<eos>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer(chat: bool = True, template: str = TEMPLATE, vocab: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences; like Llama's it puts BOS in front when asked to."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_TEXT * 4, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=_SPECIAL[3:],
    )
    tokenizer.chat_template = template if chat else None
    return tokenizer


# the families that most tests go through; tests/test_matrix.py goes through all
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_vision")


def make_model(folder: Path, kind: str, chat: bool = True, template: str = TEMPLATE) -> Path:
    """Save a random model of one architecture with its tokenizer."""
    torch.manual_seed(len(kind))
    model = MAKERS[kind]()
    if model.generation_config is not None:
        model.generation_config.do_sample = False
    model.save_pretrained(folder)
    make_tokenizer(chat, template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives the folder of a tiny model: `tiny_model("qwen2")`, `tiny_model("llama", chat=False)`."""
    made: dict[tuple[str, bool, str], Path] = {}

    def make(kind: str = "llama", chat: bool = True, template: str = TEMPLATE) -> Path:
        key = (kind, chat, template)
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(kind), kind, chat, template)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(tiny_model: Callable[..., Path]) -> Callable[..., Loaded]:
    """The same models loaded, without adapters; shared by tests, so leave their weights alone."""
    loaded: dict[tuple[str, bool, str], Loaded] = {}

    def get(kind: str = "llama", chat: bool = True, template: str = TEMPLATE) -> Loaded:
        key = (kind, chat, template)
        if key not in loaded:
            loaded[key] = load(str(tiny_model(kind, chat, template)), device="cpu")
        return loaded[key]

    return get


@pytest.fixture(params=ARCHITECTURES)
def each(request: pytest.FixtureRequest, tiny: Callable[..., Loaded]) -> Loaded:
    """Every architecture in turn."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def stories() -> Path:
    """A small pretrained story model without a chat template, where there is one."""
    if not (STORIES / "config.json").is_file():
        pytest.skip(f"no pretrained model at {STORIES}")
    return STORIES
