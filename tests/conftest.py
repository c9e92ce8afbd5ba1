"""Fixtures shared by all tests: a tiny tokenizer, a tiny model, and the place of optional real data."""

import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

# Tests never ask the Hub; without this a mistyped name would wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from chatmodel import GPTConfig, GPTForCausalLM
from chatmodel.tokenizer import calculator_table, train_tokenizer

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-root", type=Path, help="folder with real data for tests marked 'data'")
    parser.addoption("--nanochat-root", type=Path, action="append", help="a checkout of nanochat; may be repeated")


@pytest.fixture
def data_root(request: pytest.FixtureRequest) -> Path:
    root = request.config.getoption("--data-root")
    assert root is not None, "tests marked 'data' need --data-root PATH"
    return root


@pytest.fixture
def nanochat_roots(request: pytest.FixtureRequest) -> list[Path]:
    roots = request.config.getoption("--nanochat-root")
    if not roots:
        pytest.skip("needs --nanochat-root PATH, a checkout of nanochat at c75fe54 or 92d63d4")
    return roots


@pytest.fixture(scope="session")
def tokenizer():
    """512 tokens, nine of them special."""
    numbers = " ".join(f"{n} and {n * 7}" for n in range(500))
    return train_tokenizer([numbers, *topics.values()], 512, max_chars=200_000, doc_cap=10_000)


def make_model(seed: int = 0, **changes) -> GPTForCausalLM:
    """A small model whose every parameter is random: fresh ones start with zeroed outputs, which hide mistakes."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "sliding_window": 6,
    }
    torch.manual_seed(seed)
    model = GPTForCausalLM(GPTConfig(**(settings | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="session")
def chat_model(tokenizer) -> GPTForCausalLM:
    """A random model over `tokenizer`, with the calculator on."""
    return make_model(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        calculator=calculator_table(tokenizer),
    )
