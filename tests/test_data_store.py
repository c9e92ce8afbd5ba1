"""Documents on disk as ids: the right ones, whole, traceable, and reused only where they fit."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from chatmodel.data import encoding as encoding_module
from chatmodel.data import store as store_module
from chatmodel.data.checksums import find_damaged_block, hash_blocks
from chatmodel.data.store import TokenStore, build_token_store, ensure_token_store, hash_tokenizer
from chatmodel.runtime import UserError
from chatmodel.tokenizer import convert_tokens, train_tokenizer

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
        "bad_shards": [],
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
    monkeypatch.setattr(encoding_module, "BATCH_CHARS", 40)
    documents = [f"document {n} " + "word " * (n % 7) for n in range(300)]
    many = build(tmp_path / "many", tokenizer, documents, num_workers=4)
    assert many.num_documents == 300
    assert many.tokens.tolist() == build(tmp_path / "one", tokenizer, documents, num_workers=1).tokens.tolist()


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


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin"])
def test_changed_bytes_are_found_on_request(tmp_path, tokenizer, name):
    build(tmp_path / "train", tokenizer)
    TokenStore.open(tmp_path / "train", check_hash=True)
    flip_a_bit(tmp_path / "train" / name)
    TokenStore.open(tmp_path / "train")
    with pytest.raises(UserError, match=rf"{name} is damaged \(block 0 of 1 has another sha256"):
        TokenStore.open(tmp_path / "train", check_hash=True)


def test_a_store_without_checksums_is_named(tmp_path, tokenizer):
    build(tmp_path / "train", tokenizer)
    (tmp_path / "train" / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"train has no checksums\.json to be checked against; delete"):
        TokenStore.open(tmp_path / "train", check_hash=True)


def test_blocks_of_a_file(tmp_path):
    file = tmp_path / "file"
    content = bytes(range(250))
    file.write_bytes(content)
    blocks = hash_blocks(file, block_bytes=100)
    assert blocks == [hashlib.sha256(part).hexdigest() for part in (content[:100], content[100:200], content[200:])]
    assert find_damaged_block(file, blocks, block_bytes=100) is None
    file.write_bytes(content[:150] + b"x" + content[151:])
    assert find_damaged_block(file, blocks, block_bytes=100) == 1


def test_spans_are_read_as_they_are_mapped(tmp_path, tokenizer):
    store = build(tmp_path / "train", tokenizer)
    spans = [(3, 9), (0, 1), (5, 5), (0, store.num_tokens)]
    assert store.read_spans(spans).tolist() == [t for start, stop in spans for t in store.tokens[start:stop].tolist()]
    assert store.read_spans([]).tolist() == []
    os.truncate(tmp_path / "train" / "tokens.bin", 8)
    with pytest.raises(UserError, match=r"tokens\.bin has been cut short; delete"):
        store.read_spans(spans)


def test_a_full_disk_is_named(tmp_path, tokenizer, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.TokenWriter, "append", fail)
    with pytest.raises(UserError, match=r"train cannot be written \(No space left on device\); free space"):
        build(tmp_path / "train", tokenizer)
    assert list(tmp_path.iterdir()) == []


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
        with pytest.raises(UserError, match=r"an earlier state of dataset .* \(bytes was \d+, is \d+\); delete"):
            self.ensure(dataset, tokenizer, folder)

    def test_another_validation_shard_is_refused(self, dataset, tokenizer, tmp_path):
        train, _ = self.ensure(dataset, tokenizer, tmp_path / "data")
        assert train.manifest["dataset"]["validation"] == "b.jsonl"
        (dataset / "c.jsonl").write_text('{"text": "one more shard"}')
        with pytest.raises(
            UserError, match=r"earlier state .* \(validation was b.jsonl, is c.jsonl; files was 2, is 3"
        ):
            self.ensure(dataset, tokenizer, tmp_path / "data")

    def test_sources_are_listed(self, dataset, tokenizer, tmp_path):
        self.ensure(dataset, tokenizer, tmp_path / "data")
        a = dataset / "a.jsonl"
        digest = hashlib.sha256(a.read_bytes()).hexdigest()
        checksums = json.loads((tmp_path / "data" / "train" / "checksums.json").read_text())
        assert checksums["sources"] == [{"name": "a.jsonl", "bytes": a.stat().st_size, "sha256": digest}]
        listing = json.loads((tmp_path / "data" / "sources.json").read_text())["files"]
        assert listing[0] == checksums["sources"][0] | {"modified": a.stat().st_mtime_ns}
        assert [facts["name"] for facts in listing] == ["a.jsonl", "b.jsonl"]

    def test_sources_are_read_again_only_where_they_changed(self, dataset, tokenizer, tmp_path, monkeypatch):
        self.ensure(dataset, tokenizer, tmp_path / "data")
        monkeypatch.setattr("chatmodel.data.files.hash_file", lambda file: pytest.fail(f"{file} is read again"))
        self.ensure(dataset, tokenizer, tmp_path / "data")
        monkeypatch.undo()
        os.utime(dataset / "a.jsonl")  # looks changed, but is not
        self.ensure(dataset, tokenizer, tmp_path / "data")

    def test_a_flipped_bit_in_the_store(self, dataset, tokenizer, tmp_path):
        folder = tmp_path / "data"
        self.ensure(dataset, tokenizer, folder)
        flip_a_bit(folder / "train" / "tokens.bin")
        self.ensure(dataset, tokenizer, folder, check_hash=False)
        with pytest.raises(UserError, match=r"tokens\.bin is damaged .* delete .*train and start again"):
            self.ensure(dataset, tokenizer, folder)
        train, _ = self.ensure(dataset, tokenizer, folder, rebuild=True)
        TokenStore.open(train.folder, check_hash=True)

    def test_a_flipped_bit_in_a_source_seen_before(self, dataset, tokenizer, tmp_path):
        """A bit that flips on the disk changes neither size nor time, and here not even the form of the file."""
        folder = tmp_path / "data"
        self.ensure(dataset, tokenizer, folder)
        file = dataset / "a.jsonl"
        status = file.stat()
        file.write_bytes(file.read_bytes().replace(b"words", b"wordr", 1))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.ensure(dataset, tokenizer, folder)  # the store was made before, and is whole
        more = {"max_train_tokens": 150, "rebuild": True}
        with pytest.raises(UserError, match=r"a\.jsonl is damaged: its sha256 is .* but an earlier reading"):
            self.ensure(dataset, tokenizer, folder, **more)
        with pytest.raises(UserError, match="no documents for the split 'train'"):  # it was the only one
            self.ensure(dataset, tokenizer, folder, **more, on_bad_shard="skip")

    def test_rebuilt_when_allowed(self, dataset, tokenizer, tmp_path):
        folder = tmp_path / "data"
        self.ensure(dataset, tokenizer, folder)
        assert self.ensure(dataset, tokenizer, folder, max_train_tokens=150, rebuild=True)[0].num_tokens == 150
        (folder / "train" / "tokens.bin").write_bytes(b"")
        with pytest.raises(UserError, match="cut short"):
            self.ensure(dataset, tokenizer, folder, max_train_tokens=150)
        train, _ = self.ensure(dataset, tokenizer, folder, max_train_tokens=150, rebuild=True)
        assert train.num_tokens == 150
        assert sorted(path.name for path in folder.iterdir()) == ["sources.json", "train", "validation"]

    def test_hub_that_does_not_answer(self, dataset, tokenizer, tmp_path, monkeypatch):
        def unreachable(name, **_):
            raise UserError("the Hub cannot be reached")

        folder = tmp_path / "data"
        facts = {"name": "owner/name", "manifest": "1" * 64}
        monkeypatch.setattr(store_module, "describe_corpus", lambda name, **_: facts)
        monkeypatch.setattr(store_module, "open_split", lambda name, split, **_: iter(["some text"] * 9))
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
