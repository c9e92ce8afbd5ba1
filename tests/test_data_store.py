"""Documents on disk as ids: the right ones, whole, traceable, and reused only where they fit."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from chatmodel.data import store as store_module
from chatmodel.data.store import TokenStore, build_token_store, encode_documents, ensure_token_store, hash_tokenizer
from chatmodel.runtime import UserError
from chatmodel.tokenizer import build_encoding, convert_tokens, train_tokenizer

DOCUMENTS = [
    "The first document.",
    "",
    "Zweites, mit Umlauten: äöü 文字",
    "a third one <|bos|> which is no control token",
]
DATASET = {"name": "made up", "manifest": "0" * 64, "text_column": "text"}


def build(folder: Path, tokenizer, documents=DOCUMENTS, **options) -> TokenStore:
    return build_token_store(documents, tokenizer, folder, dataset=DATASET, split="train", **options)


def read_documents(store: TokenStore) -> list[list[int]]:
    return [
        store.tokens[start:stop].tolist() for start, stop in zip(store.offsets[:-1], store.offsets[1:], strict=True)
    ]


def test_documents_begin_with_bos_and_match_the_tokenizer(tmp_path, tokenizer):
    store = build(tmp_path / "train", tokenizer)
    expected = [
        [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)]
        for text in DOCUMENTS
        if text  # empty documents are left out
    ]
    assert read_documents(store) == expected
    assert store.tokens.dtype == np.uint16
    assert store.tokens.tolist().count(tokenizer.bos_token_id) == 3
    assert store.lengths.tolist() == [len(ids) for ids in expected]


def test_manifest_counts(tmp_path, tokenizer):
    store = build(tmp_path / "train", tokenizer)
    content = (tmp_path / "train" / "tokens.bin").read_bytes()
    assert store.manifest == {
        "split": "train",
        "dataset": DATASET,
        "tokenizer": hash_tokenizer(tokenizer),
        "max_tokens": None,
        "documents": 3,
        "tokens": len(content) // 2,
        "bytes": sum(len(text.encode()) for text in DOCUMENTS),
        "exhausted": True,
        "dtype": "uint16",
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["train"]  # nothing is left beside it


def test_large_vocabulary_takes_uint32(tmp_path):
    single = [bytes([n]) for n in range(256)]
    tokenizer = convert_tokens([*single, *(a + b for a in single for b in single)])
    assert tokenizer.bos_token_id > 2**16
    store = build(tmp_path / "train", tokenizer, ["abcd"])
    assert store.tokens.dtype == np.uint32
    pair = [256 + 256 * ord("a") + ord("b"), 256 + 256 * ord("c") + ord("d")]
    assert read_documents(store) == [[tokenizer.bos_token_id, *pair]]
    assert TokenStore.open(tmp_path / "train", check_hash=True).num_tokens == 3


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6, 7, 11, 12, 13, 100])
def test_limit_cuts_the_last_document(tmp_path, tokenizer, max_tokens):
    # Letters that merge with nothing: documents of 6 tokens each, the <|bos|> included, 12 in all.
    documents = ["\x01\x02\x03\x04\x05", "\x05\x04\x03\x02\x01"]
    whole = [tokenizer.bos_token_id, 1, 2, 3, 4, 5, tokenizer.bos_token_id, 5, 4, 3, 2, 1]
    if max_tokens == 1:  # a lone <|bos|> is no document
        with pytest.raises(UserError, match="no documents for the split 'train'"):
            build(tmp_path / "train", tokenizer, documents, max_tokens=max_tokens)
        return
    store = build(tmp_path / "train", tokenizer, documents, max_tokens=max_tokens)
    expected = whole[: 6 if max_tokens == 7 else max_tokens]
    assert store.tokens.tolist() == expected
    assert store.manifest["bytes"] == sum(token != tokenizer.bos_token_id for token in expected)
    assert store.manifest["exhausted"] is (max_tokens > 12)


def test_order_survives_threads_and_batches(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(store_module, "BATCH_CHARS", 40)
    documents = [f"document {n} " + "word " * (n % 7) for n in range(300)]
    many = build(tmp_path / "many", tokenizer, documents, num_threads=4)
    assert many.num_documents == 300
    assert many.tokens.tolist() == build(tmp_path / "one", tokenizer, documents, num_threads=1).tokens.tolist()


def test_encoding_equals_tiktokens_ordinary(tokenizer):
    encoding = build_encoding(tokenizer)
    texts = [*DOCUMENTS[2:], "a lone \ud800 surrogate", "  spaces  \r\n\n and 12345"]
    encoded = [ids.tolist() for batch in encode_documents(texts, encoding, num_threads=2) for ids, _ in batch]
    assert encoded == encoding.encode_ordinary_batch(texts)
    lengths = [size for batch in encode_documents(texts, encoding, num_threads=2) for _, size in batch]
    assert lengths == [len(encoding.decode_bytes(ids)) for ids in encoded]


def test_no_documents_leave_nothing_behind(tmp_path, tokenizer):
    with pytest.raises(UserError, match="made up has no documents"):
        build(tmp_path / "train", tokenizer, ["", ""])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot hold 0 tokens"):
        build(tmp_path / "train", tokenizer, max_tokens=0)


def test_an_interrupted_build_leaves_nothing_behind(tmp_path, tokenizer):
    def documents():
        yield "the first one"
        raise UserError("the second one is damaged")

    with pytest.raises(UserError, match="the second one is damaged"):
        build(tmp_path / "train", tokenizer, documents())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin"])
@pytest.mark.parametrize("change", ["cut", "gone"])
def test_truncated_store_is_named(tmp_path, tokenizer, name, change):
    build(tmp_path / "train", tokenizer)
    file = tmp_path / "train" / name
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(UserError, match=rf"{name} is cut short or damaged .* delete .*train"):
        TokenStore.open(tmp_path / "train")


def test_changed_bytes_are_found_on_request(tmp_path, tokenizer):
    build(tmp_path / "train", tokenizer)
    file = tmp_path / "train" / "tokens.bin"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    TokenStore.open(tmp_path / "train")
    with pytest.raises(UserError, match="sha256"):
        TokenStore.open(tmp_path / "train", check_hash=True)


def test_missing_store(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json does not exist"):
        TokenStore.open(tmp_path)


def test_tokenizer_hash(tokenizer):
    before = hash_tokenizer(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert hash_tokenizer(tokenizer) == before  # how it was last called does not matter
    other = train_tokenizer(["other words make other merges " * 9], 270, max_chars=1_000, doc_cap=1_000)
    assert hash_tokenizer(other) != before


class TestEnsure:
    """`ensure_token_store`: reuse what fits, refuse or rebuild what does not."""

    @pytest.fixture
    def dataset(self, tmp_path) -> Path:
        folder = tmp_path / "text"
        folder.mkdir()
        for name in ("a", "b"):
            rows = [{"text": f"{name} document {n} with some words in it"} for n in range(20)]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder

    def ensure(self, dataset, tokenizer, folder, **options):
        settings = {"max_train_tokens": 100, "max_validation_tokens": 50} | options
        return ensure_token_store(str(dataset), tokenizer, folder, **settings)

    def test_built_from_the_right_shards(self, dataset, tokenizer, tmp_path):
        train, validation = self.ensure(dataset, tokenizer, tmp_path / "data")
        assert (train.folder, validation.folder) == (tmp_path / "data" / "train", tmp_path / "data" / "validation")
        assert (train.num_tokens, validation.num_tokens) == (100, 50)
        assert tokenizer.decode(train.tokens[1:4].tolist()).startswith("a")
        assert tokenizer.decode(validation.tokens[1:4].tolist()).startswith("b")
        assert train.manifest["dataset"]["name"] == str(dataset)
        assert validation.manifest["split"] == "validation"

    def test_reused_when_enough(self, dataset, tokenizer, tmp_path, monkeypatch):
        first, _ = self.ensure(dataset, tokenizer, tmp_path / "data")
        monkeypatch.setattr(store_module, "build_token_store", lambda *_, **__: pytest.fail("built again"))
        assert self.ensure(dataset, tokenizer, tmp_path / "data")[0].manifest == first.manifest
        assert self.ensure(dataset, tokenizer, tmp_path / "data", max_train_tokens=60)[0].num_tokens == 100

    def test_all_there_is_is_enough_for_any_demand(self, dataset, tokenizer, tmp_path, monkeypatch):
        first, _ = self.ensure(dataset, tokenizer, tmp_path / "data", max_train_tokens=10**6)
        assert first.manifest["exhausted"]
        monkeypatch.setattr(store_module, "build_token_store", lambda *_, **__: pytest.fail("built again"))
        self.ensure(dataset, tokenizer, tmp_path / "data", max_train_tokens=10**9)

    def test_refused_when_it_does_not_fit(self, dataset, tokenizer, tmp_path):
        folder = tmp_path / "data"
        self.ensure(dataset, tokenizer, folder)
        with pytest.raises(UserError, match="holds 100 tokens, but 1,000 are asked for; delete"):
            self.ensure(dataset, tokenizer, folder, max_train_tokens=1_000)
        other = train_tokenizer(["other words make other merges " * 9], 270, max_chars=1_000, doc_cap=1_000)
        with pytest.raises(UserError, match=r"was made with another tokenizer; delete .*data .* --run_dir"):
            self.ensure(dataset, other, folder)
        renamed = dataset.rename(tmp_path / "renamed")
        self.ensure(renamed, tokenizer, folder)  # the same files in another place
        (renamed / "a.jsonl").write_text('{"text": "changed"}')
        with pytest.raises(UserError, match=r"was made from dataset .*text, not from .*renamed"):
            self.ensure(renamed, tokenizer, folder)
        renamed.rename(dataset)
        with pytest.raises(UserError, match="was made from an earlier state of dataset"):
            self.ensure(dataset, tokenizer, folder)

    def test_rebuilt_when_allowed(self, dataset, tokenizer, tmp_path):
        folder = tmp_path / "data"
        self.ensure(dataset, tokenizer, folder)
        assert self.ensure(dataset, tokenizer, folder, max_train_tokens=150, rebuild=True)[0].num_tokens == 150
        (folder / "train" / "tokens.bin").write_bytes(b"")
        with pytest.raises(UserError, match="cut short"):
            self.ensure(dataset, tokenizer, folder, max_train_tokens=150)
        train, _ = self.ensure(dataset, tokenizer, folder, max_train_tokens=150, rebuild=True)
        assert train.num_tokens == 150
        assert sorted(path.name for path in folder.iterdir()) == ["train", "validation"]

    def test_hub_that_does_not_answer(self, dataset, tokenizer, tmp_path, monkeypatch):
        def unreachable(name):
            raise UserError("the Hub cannot be reached")

        folder = tmp_path / "data"
        facts = {"name": "owner/name", "manifest": "1" * 64}
        monkeypatch.setattr(store_module, "describe_corpus", lambda name: facts)
        monkeypatch.setattr(store_module, "stream_documents", lambda name, split, text_column: iter(["some text"] * 9))
        first, _ = self.ensure("owner/name", tokenizer, folder)
        monkeypatch.setattr(store_module, "describe_corpus", unreachable)
        assert self.ensure("owner/name", tokenizer, folder)[0].manifest == first.manifest
        for name, place in (("owner/other", folder), ("owner/name", tmp_path / "new")):
            with pytest.raises(UserError, match="cannot be reached"):
                self.ensure(name, tokenizer, place)


@pytest.mark.data
def test_real_shards(data_root, tokenizer, tmp_path):
    train, validation = ensure_token_store(
        str(data_root / "pretrain"), tokenizer, tmp_path, max_train_tokens=300_000, max_validation_tokens=100_000
    )
    assert (train.num_tokens, validation.num_tokens) == (300_000, 100_000)
    assert 1 < train.manifest["bytes"] / train.num_tokens < 5
