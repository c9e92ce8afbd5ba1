"""Hub data sets, through `datasets` itself on local folders: it opens both alike."""

import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset

from chatmodel.data import hub
from chatmodel.data.files import hash_file, is_validation
from chatmodel.data.hub import (
    HubName,
    describe_hub,
    fetch_file,
    open_builder,
    open_hub_split,
    parse_hub_name,
    path_in_repository,
    resume_on_failure,
    with_revision,
)
from chatmodel.data.shards import Shards
from chatmodel.data.store import ensure_token_store
from chatmodel.runtime import UserError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)


def write_shards(folder: Path, shards: dict[str, list[str]], column: str = "text") -> str:
    for name, texts in shards.items():
        pq.write_table(pa.table({column: texts}), folder / f"{name}.parquet")
    return str(folder)


def stream_all(dataset: str, split: str) -> list[str]:
    return list(open_hub_split(dataset, split, text_column="text"))


def test_own_validation_split(tmp_path):
    dataset = write_shards(tmp_path, {"train-0": ["a"], "train-1": ["b", ""], "validation-0": ["c"]})
    assert stream_all(dataset, "train") == ["a", "b"]
    assert stream_all(dataset, "validation") == ["c"]


def test_last_shard_where_there_is_only_train(tmp_path):
    dataset = write_shards(tmp_path, {f"shard_{n:05}": [f"text {n}", f"more {n}"] for n in range(3)})
    assert stream_all(dataset, "train") == ["text 0", "more 0", "text 1", "more 1"]
    assert stream_all(dataset, "validation") == ["text 2", "more 2"]


def test_single_file_is_divided_by_hash(tmp_path):
    texts = [f"document {n}" for n in range(3_000)]
    dataset = write_shards(tmp_path, {"all": texts})
    validation = stream_all(dataset, "validation")
    assert validation == [text for text in texts if is_validation(text, share=0.001)]
    assert 1 <= len(validation) <= 12
    assert sorted([*validation, *stream_all(dataset, "train")]) == sorted(texts)


def test_missing_column(tmp_path):
    dataset = write_shards(tmp_path, {"a": ["x"], "b": ["y"]}, column="body")
    with pytest.raises(UserError, match="has no column 'text', only body"):
        stream_all(dataset, "train")
    assert list(open_hub_split(dataset, "train", text_column="body")) == ["x"]


def test_unreachable_hub_says_what_to_do():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match=r"is no local folder, and the Hub cannot be reached.*--dataset embedded"):
        stream_all("nobody/nothing-of-this-name", "train")


def test_what_is_waited_for_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    caplog.set_level("INFO", "chatmodel")
    for _ in range(2):
        hub.announce_question("nobody/asked-before")
    assert caplog.messages == [
        "asking the Hub for dataset nobody/asked-before (for half a minute, if it does not answer)"
    ]


def test_folder_that_datasets_cannot_open(tmp_path):
    with pytest.raises(UserError, match="cannot be opened from the Hub"):
        stream_all(str(tmp_path), "train")


def test_unknown_configuration(tmp_path):
    dataset = write_shards(tmp_path, {"train": ["x"]})
    with pytest.raises(UserError, match=r"cannot be opened from the Hub.*config"):
        open_builder(f"{dataset}:nonsense")


def flaky_rows(failures: list[int]):
    """Ten rows; before row n an error, as often as n stands in `failures`."""

    def rows():
        for number in range(10):
            if number in failures:
                failures.remove(number)
                raise ConnectionError("the line is dead")
            yield {"text": str(number)}

    return IterableDataset.from_generator(rows)


def test_reading_continues_behind_the_last_row():
    stream = flaky_rows([0, 3, 3, 9])
    assert [row["text"] for row in resume_on_failure(stream, "name")] == [str(n) for n in range(10)]


def test_reading_gives_up_in_the_end():
    rows = resume_on_failure(flaky_rows([4] * hub.MAX_ATTEMPTS), "owner/name")
    assert [next(rows)["text"] for _ in range(4)] == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match=r"owner/name from the Hub failed 6 times in a row \(the line is dead\)"):
        next(rows)


def test_description_follows_the_contents(monkeypatch):
    root = "hf://datasets/owner/name@abc/"
    files = {"train": [root + "data/1.parquet", root + "data/0.parquet"]}
    builder = SimpleNamespace(
        name="parquet", config=SimpleNamespace(data_files=files), info=SimpleNamespace(splits=None)
    )
    monkeypatch.setattr(hub, "open_builder", lambda name: builder)

    def describe(digest: str, revision: str) -> dict:
        siblings = [
            SimpleNamespace(rfilename="data/0.parquet", size=10, lfs=SimpleNamespace(sha256=digest), blob_id="b"),
            SimpleNamespace(rfilename="data/1.parquet", size=11, lfs=None, blob_id="c"),
            SimpleNamespace(rfilename="README.md", size=1, lfs=None, blob_id=revision),
        ]
        info = SimpleNamespace(sha=revision, siblings=siblings)
        monkeypatch.setattr(hub.HfApi, "dataset_info", lambda self, name, revision, files_metadata: info)
        return describe_hub("owner/name")

    first = describe("d1", "r1")
    assert (first["name"], first["files"], first["revision"]) == ("owner/name", 2, "r1")
    assert first["validation"] == "data/1.parquet"
    assert describe("d1", "r2")["manifest"] == first["manifest"]  # a new README changes nothing
    assert describe("d2", "r2")["manifest"] != first["manifest"]
    builder.info.splits = {"train": SimpleNamespace(num_examples=7)}
    assert describe("d1", "r1")["documents"] == 7


def test_path_in_repository():
    assert path_in_repository("hf://datasets/owner/name@abc/data/train 0.parquet") == "data/train 0.parquet"
    assert path_in_repository("/local/file.parquet") == "/local/file.parquet"


def test_names():
    assert parse_hub_name("owner/name") == HubName("owner/name")
    assert parse_hub_name("owner/name@abc:small") == HubName("owner/name", "abc", "small")
    assert with_revision("owner/name:small", "abc") == "owner/name@abc:small"
    assert with_revision("owner/name@main", "abc") == "owner/name@abc"


class FakeHub:
    """Data sets of parquet shards, of which every commit stays there, behind a line that breaks at times."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root = root
        self.failures: list[Exception] = []
        self.requests: list[str] = []
        self.damaged = 0  # downloads that arrive with a flipped bit
        monkeypatch.setattr(hub, "open_builder", self.open_builder)
        monkeypatch.setattr(hub.HfApi, "dataset_info", lambda _, name, **options: self.describe(**options))
        monkeypatch.setattr(hub, "hf_hub_download", self.download)

    def commit(self, revision: str, shards: dict[str, list[str]]) -> None:
        folder = self.root / "hub" / revision
        folder.mkdir(parents=True)
        write_shards(folder, shards)
        self.head = revision

    def files(self, revision: str | None) -> list[Path]:
        return sorted((self.root / "hub" / (revision or self.head)).iterdir())

    def open_builder(self, dataset: str) -> SimpleNamespace:
        name = parse_hub_name(dataset)
        addresses = [f"hf://datasets/{name.repository}@x/{file.name}" for file in self.files(name.revision)]
        return SimpleNamespace(
            name="parquet", config=SimpleNamespace(data_files={"train": addresses}), info=SimpleNamespace(splits=None)
        )

    def describe(self, *, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        siblings = [
            SimpleNamespace(rfilename=file.name, size=file.stat().st_size, lfs=SimpleNamespace(sha256=hash_file(file)))
            for file in self.files(revision)
        ]
        return SimpleNamespace(sha=revision or self.head, siblings=siblings)

    def download(self, repository: str, path: str, *, repo_type: str, revision: str, force_download: bool) -> str:
        target = self.root / "cache" / revision / path
        if force_download or not target.exists():
            self.requests.append(path)
            if self.failures:
                raise self.failures.pop(0)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = bytearray((self.root / "hub" / revision / path).read_bytes())
            if self.damaged:
                self.damaged -= 1
                content[len(content) // 3] ^= 1
            target.write_bytes(content)
        return str(target)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch) -> FakeHub:
    """Three shards of ten documents."""
    fake = FakeHub(tmp_path, monkeypatch)
    fake.commit("c1", {f"shard_{n}": [f"shard {n} text {i}" for i in range(10)] for n in range(3)})
    return fake


def ensure(tokenizer, folder: Path, dataset: str = "owner/name", **options):
    return ensure_token_store(dataset, tokenizer, folder, max_train_tokens=10**6, **options)


def test_shards_are_fetched_one_by_one_and_kept(fake_hub):
    split = open_hub_split("owner/name", "train", text_column="text")
    assert isinstance(split, Shards)
    expected = [f"shard {n} text {i}" for n in range(2) for i in range(10)]
    assert list(split.read()) == list(split.read()) == expected
    assert fake_hub.requests == ["shard_0.parquet", "shard_1.parquet"]  # the second time they are there
    assert stream_all_shards("validation") == [f"shard 2 text {i}" for i in range(10)]


def stream_all_shards(split: str) -> list[str]:
    return list(open_hub_split("owner/name", split, text_column="text").read())


def test_large_shards_are_streamed(fake_hub, monkeypatch):
    monkeypatch.setattr(hub, "MAX_FETCHED_BYTES", 10)
    monkeypatch.setattr(
        hub, "open_stream", lambda builder, files: IterableDataset.from_generator(lambda: files_of(files))
    )

    def files_of(files):
        yield from ({"text": address} for address in files.addresses)

    streamed = open_hub_split("owner/name", "validation", text_column="text")
    assert list(streamed) == ["hf://datasets/owner/name@x/shard_2.parquet"]


def test_a_broken_line_is_taken_up_at_the_shard_where_it_broke(fake_hub, tokenizer, tmp_path, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    fetch = fake_hub.download

    def download(*args, **options):
        if "shard_1.parquet" in args and len(fake_hub.requests) == 1:
            fake_hub.failures = [ConnectionError("the line is dead")] * 3
        return fetch(*args, **options)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    train, _ = ensure(tokenizer, tmp_path / "data")
    assert train.num_documents == 20
    assert pauses == [2.0, 4.0, 8.0]
    assert fake_hub.requests == ["shard_0.parquet", *["shard_1.parquet"] * 4, "shard_2.parquet"]


def test_fetching_gives_up_in_the_end(fake_hub):
    fake_hub.failures = [ConnectionError("the line is dead")] * 9
    with pytest.raises(
        UserError, match=r"fetching shard_0.parquet of dataset owner/name@c1 .* failed 6 times in a row"
    ):
        stream_all_shards("train")
    assert len(fake_hub.requests) == hub.MAX_ATTEMPTS
    assert stream_all_shards("validation")  # and begins again where it stopped
    fake_hub.failures = []
    assert len(stream_all_shards("train")) == 20


def refusal(status: int) -> Exception:
    error = OSError(f"{status} from the server")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("error", "attempts"),
    [(refusal(404), 1), (refusal(401), 1), (refusal(429), 6), (refusal(503), 6), (OSError(28, "No space left"), 1)],
)
def test_what_another_attempt_cannot_change_is_not_tried_again(fake_hub, error, attempts):
    fake_hub.failures = [error] * 9
    with pytest.raises(UserError, match="fetching shard_1"):
        fetch_file(HubName("owner/name", "c1"), "shard_1.parquet", False)
    assert len(fake_hub.requests) == attempts


def test_a_damaged_download_is_found_by_the_hubs_sha256(fake_hub, tokenizer, tmp_path):
    fake_hub.damaged = 1
    with pytest.raises(UserError, match=r"shard_0.parquet is damaged: its sha256 is .*, but the Hub says .*'refetch'"):
        ensure(tokenizer, tmp_path / "data")
    train, _ = ensure(tokenizer, tmp_path / "data", on_bad_shard="refetch")
    assert train.num_documents == 20
    (record,) = train.manifest["bad_shards"]
    assert (record["name"], record["skipped"]) == ("shard_0.parquet", False)


def test_validation_stays_what_it_was(fake_hub, tokenizer, tmp_path):
    first, validation = ensure(tokenizer, tmp_path / "data")
    facts = first.manifest["dataset"]
    assert (facts["revision"], facts["validation"]) == ("c1", "shard_2.parquet")
    fake_hub.commit("c2", {f"shard_{n}": [f"shard {n} text {i}" for i in range(10)] for n in range(4)})
    with pytest.raises(
        UserError, match=r"\(revision was c1, is c2; validation was shard_2.parquet, is shard_3.parquet;"
    ):
        ensure(tokenizer, tmp_path / "data")
    again = ensure(tokenizer, tmp_path / "data", dataset="owner/name@c1")
    assert [store.manifest for store in again] == [first.manifest, validation.manifest]
    other, _ = ensure(tokenizer, tmp_path / "other", dataset="owner/name@c1")
    assert other.manifest["sha256"] == first.manifest["sha256"]
