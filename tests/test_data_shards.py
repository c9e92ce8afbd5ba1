"""Shards that cannot be read: named, left out whole or fetched again, and always on record."""

import hashlib
import json
import logging
import shutil
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatmodel.data import files as files_module
from chatmodel.data.encoding import cut_shards
from chatmodel.data.files import DamagedFile
from chatmodel.data.shards import Selection, Shard, Shards, find_file_shards
from chatmodel.data.store import TokenStore, build_token_store
from chatmodel.runtime import UserError

TEXTS = {f"shard_{n}": [f"shard {n} document {i}" for i in range(30)] for n in range(4)}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Four shards of three row groups, read one by one; the last shard is for validation."""
    monkeypatch.setattr(files_module, "PIECE_BYTES", 1)
    monkeypatch.setattr(files_module, "READ_BATCH", 10)
    root = tmp_path / "text"
    root.mkdir()
    for name, texts in TEXTS.items():
        pq.write_table(
            pa.table({"text": texts}), root / f"{name}.parquet", row_group_size=10, write_page_checksum=True
        )
    return root


def flip_last_page(file: Path) -> None:
    """One bit of the last row group's text; the row groups before stay good."""
    content = file.read_bytes()
    place = content.rindex(b"document", 0, content.rindex(b"PAR1") - 900)
    file.write_bytes(content[:place] + b"e" + content[place + 1 :])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def find(folder: Path) -> Shards:
    return find_file_shards(str(folder), "train", text_column="text")


def build(shards: Shards, tokenizer, target: Path, **options) -> TokenStore:
    return build_token_store(shards, tokenizer, target, dataset={"name": "made up"}, split="train", **options)


def read_back(store: TokenStore, tokenizer) -> list[str]:
    spans = zip(store.offsets[:-1], store.offsets[1:], strict=True)
    return [tokenizer.decode(store.tokens[start + 1 : stop].tolist()) for start, stop in spans]


@pytest.mark.parametrize("damage", [flip_last_page, cut])
def test_stopping_names_the_shard(folder, tokenizer, tmp_path, damage):
    damage(folder / "shard_1.parquet")
    with pytest.raises(DamagedFile, match=r"shard_1\.parquet is damaged .* with on_bad_shard 'skip' it is left out"):
        build(find(folder), tokenizer, tmp_path / "train")
    assert not (tmp_path / "train").exists()
    with pytest.raises(DamagedFile, match=r"shard_1\.parquet is damaged"):
        list(find(folder).read())


@pytest.mark.parametrize("damage", [flip_last_page, cut])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_skipped_shard_is_left_out_whole_and_recorded(folder, tokenizer, tmp_path, caplog, damage, number):
    name = f"shard_{number}.parquet"
    damage(folder / name)
    with caplog.at_level(logging.WARNING, logger="chatmodel"):
        store = build(find(folder), tokenizer, tmp_path / "train", on_bad_shard="skip")
    rest = [n for n in range(3) if n != number]
    assert read_back(store, tokenizer) == [text for n in rest for text in TEXTS[f"shard_{n}"]]
    assert store.num_documents == 60
    assert store.manifest["bytes"] == sum(len(text) for n in rest for text in TEXTS[f"shard_{n}"])
    assert store.manifest["sha256"] == hashlib.sha256((store.folder / "tokens.bin").read_bytes()).hexdigest()
    (record,) = store.manifest["bad_shards"]
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert (record["name"], record["sha256"], record["skipped"]) == (name, digest, True)
    assert "is damaged" in record["reason"]
    assert f"bad shard {name} is skipped" in caplog.text
    sources = json.loads((store.folder / "checksums.json").read_text())["sources"]
    assert [source["name"] for source in sources] == [f"shard_{n}.parquet" for n in rest]


def test_damage_behind_the_limit_is_not_met(folder, tokenizer, tmp_path):
    cut(folder / "shard_2.parquet")
    store = build(find(folder), tokenizer, tmp_path / "train", max_tokens=100)
    assert store.num_tokens == 100
    assert store.manifest["bad_shards"] == []


def test_reading_as_a_stream_goes_on_behind_a_skipped_shard(folder):
    flip_last_page(folder / "shard_1.parquet")
    texts = list(find(folder).read("skip"))
    assert (texts[:30], texts[-30:]) == (TEXTS["shard_0"], TEXTS["shard_2"])
    given = texts[30:-30]  # before the damage was met; it cannot be taken back here
    assert 0 < len(given) < 30
    assert given == TEXTS["shard_1"][: len(given)]


def test_policies_that_make_no_sense(folder):
    with pytest.raises(UserError, match="on_bad_shard 'ignore' is unknown; choose one of stop, skip, refetch"):
        list(find(folder).read("ignore"))
    with pytest.raises(UserError, match="'refetch' is for data sets of the Hub"):
        list(find(folder).read("refetch"))


def test_published_checksums_find_what_parquet_does_not(folder, tokenizer, tmp_path):
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(folder.glob("*.parquet"))
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))
    assert build(find(folder), tokenizer, tmp_path / "good").num_documents == 90
    # Another text of the same size, perfectly readable.
    pq.write_table(
        pa.table({"text": [text.replace("d", "e") for text in TEXTS["shard_1"]]}), folder / "shard_1.parquet"
    )
    with pytest.raises(DamagedFile, match=r"shard_1\.parquet is damaged: its sha256 is .*, but SHA256SUMS says"):
        build(find(folder), tokenizer, tmp_path / "train")
    with pytest.raises(DamagedFile, match="SHA256SUMS says"):
        list(find(folder).read())
    (folder / "SHA256SUMS").write_text("what is this\n")
    with pytest.raises(UserError, match="SHA256SUMS has lines that are not"):
        find(folder)


class Remote:
    """A place from which files are fetched into a cache, where some arrive damaged."""

    def __init__(self, folder: Path, cache: Path, *, bad: dict[str, int], published: bool) -> None:
        self.folder, self.cache, self.bad, self.published = folder, cache, bad, published
        self.fetched: list[str] = []
        cache.mkdir()

    def fetch(self, name: str, again: bool) -> Path:
        target = self.cache / name
        if again or not target.exists():
            self.fetched.append(name)
            shutil.copy(self.folder / name, target)
            if self.bad.get(name, 0):
                self.bad[name] -= 1
                flip_last_page(target)
        return target

    def shards(self) -> Shards:
        files = sorted(self.folder.glob("*.parquet"))[:-1]
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() if self.published else None for file in files]
        return Shards(
            tuple(
                Shard(file.name, file.stat().st_size, partial(self.fetch, file.name), digest, remote=True)
                for file, digest in zip(files, digests, strict=True)
            ),
            Selection("train", "text"),
        )


@pytest.mark.parametrize("published", [True, False], ids=["by its sha256", "while reading"])
def test_a_bad_shard_is_fetched_again(folder, tokenizer, tmp_path, published):
    remote = Remote(folder, tmp_path / "cache", bad={"shard_1.parquet": 1}, published=published)
    store = build(remote.shards(), tokenizer, tmp_path / "train", on_bad_shard="refetch")
    assert read_back(store, tokenizer) == [text for n in range(3) for text in TEXTS[f"shard_{n}"]]
    assert sorted(remote.fetched) == ["shard_0.parquet", "shard_1.parquet", "shard_1.parquet", "shard_2.parquet"]
    (record,) = store.manifest["bad_shards"]
    assert (record["name"], record["skipped"]) == ("shard_1.parquet", False)
    again = Remote(folder, tmp_path / "other", bad={"shard_1.parquet": 1}, published=published)
    assert list(again.shards().read("refetch")) == [text for n in range(3) for text in TEXTS[f"shard_{n}"]]


@pytest.mark.parametrize("published", [True, False])
def test_fetching_twice_is_enough(folder, tokenizer, tmp_path, published):
    remote = Remote(folder, tmp_path / "cache", bad={"shard_1.parquet": 9}, published=published)
    with pytest.raises(DamagedFile, match=r"shard_1\.parquet is damaged.*fetched twice, so it is bad on the Hub too"):
        build(remote.shards(), tokenizer, tmp_path / "train", on_bad_shard="refetch")
    assert remote.fetched.count("shard_1.parquet") == 2
    with pytest.raises(DamagedFile, match=r"with 'refetch' it is fetched again"):
        build(remote.shards(), tokenizer, tmp_path / "train")


def test_the_next_shards_are_fetched_while_one_is_encoded(folder, tmp_path):
    remote = Remote(folder, tmp_path / "cache", bad={}, published=True)
    digests: dict[int, str] = {}
    pieces = cut_shards(remote.shards(), first=1, read=digests.__setitem__)
    assert next(pieces).shard == 1
    deadline = time.monotonic() + 5
    while len(remote.fetched) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert remote.fetched == ["shard_1.parquet", "shard_2.parquet"]
    assert [piece.shard for piece in pieces] == [1, 1, 2, 2, 2]
    assert digests == {n: hashlib.sha256((folder / f"shard_{n}.parquet").read_bytes()).hexdigest() for n in (1, 2)}
