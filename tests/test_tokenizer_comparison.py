"""The comparison with GPT-2 and GPT-4: its sample texts, its counts, and what it says without a network."""

import time
from pathlib import Path

import pytest
import requests
import tiktoken

from chatmodel.tokenizer_comparison import (
    PEER_ENCODINGS,
    RANK_ADDRESSES,
    SAMPLE_TEXTS,
    compare_token_counts,
    join_documents,
)


def test_sample_texts_are_one_or_two_kilobytes_each() -> None:
    assert list(SAMPLE_TEXTS) == ["news", "korean", "code", "math", "science"]
    for text in SAMPLE_TEXTS.values():
        assert 1000 <= len(text.encode()) <= 2048
        assert text == text.strip()
        assert "\\\n" not in text or text is SAMPLE_TEXTS["math"]  # LaTeX ends its lines with \\


def test_join_documents_stops_with_the_document_that_reaches_the_number() -> None:
    documents = iter(["abc", "def", "ghi"])
    assert join_documents(documents, num_chars=4) == "abc\ndef"
    assert list(documents) == ["ghi"]
    assert join_documents(["abc"], num_chars=100) == "abc"


def test_counts_of_peers_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_only = tiktoken.Encoding(
        "bytes", pat_str=r"\s+|\S+", mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    monkeypatch.setattr("chatmodel.tokenizer_comparison.load_encoding", lambda name: bytes_only)
    comparison = compare_token_counts({"short": "né"}, len)
    assert comparison["texts"] == [{"text": "short", "bytes": 3, "ours": 2, "gpt2": 3, "gpt4": 3}]
    assert comparison["vocab_sizes"] == {"gpt2": 256, "gpt4": 256}
    assert (comparison["not_run"], comparison["how"]) == (None, None)


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_without_network_and_cache_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    asked = []

    def refuse(address: str, timeout: float) -> None:
        asked.append((address, timeout))
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", refuse)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    started = time.perf_counter()
    comparison = compare_token_counts({"news": "some text"}, lambda text: 4)
    assert time.perf_counter() - started < 2
    assert comparison["texts"] == [{"text": "news", "bytes": 9, "ours": 4, "gpt2": None, "gpt4": None}]
    assert comparison["not_run"] == (
        f"tiktoken's files of gpt2 and cl100k_base are neither in {tmp_path} nor had from "
        "openaipublic.blob.core.windows.net"
    )
    code, command, *_ = comparison["how"].split("`")
    assert (code, command) == (
        "",
        "TIKTOKEN_CACHE_DIR=ranks python -c "
        """'import tiktoken; tiktoken.get_encoding("gpt2"); tiktoken.get_encoding("cl100k_base")'""",
    )
    assert [address for address, _ in asked] == [addresses[0] for addresses in RANK_ADDRESSES.values()]
    assert all(timeout <= 10 for _, timeout in asked)


def test_addresses_cover_the_peers() -> None:
    assert set(PEER_ENCODINGS.values()) == set(RANK_ADDRESSES)


@pytest.mark.data
def test_counts_of_gpt2_and_gpt4(monkeypatch: pytest.MonkeyPatch, data_root: Path) -> None:
    def refuse(address: str, timeout: float) -> None:
        raise AssertionError(f"asked the network for {address}")

    monkeypatch.setattr(requests, "head", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data_root / "tiktoken_cache"))
    comparison = compare_token_counts({"hello": "hello world", "digits": "1234567"}, len)
    # "hello"+" world"; GPT-4 takes digits in threes (123|456|7), GPT-2 merges digits by frequency alone.
    assert [(row["gpt2"], row["gpt4"]) for row in comparison["texts"]] == [(2, 2), (3, 3)]
    assert comparison["vocab_sizes"] == {"gpt2": 50257, "gpt4": 100277}
    assert comparison["not_run"] is None
