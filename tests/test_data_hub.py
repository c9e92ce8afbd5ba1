"""Hub data sets, through `datasets` itself on local folders: it opens both alike."""

import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset

from chatmodel.data import hub
from chatmodel.data.files import is_validation
from chatmodel.data.hub import describe_hub, open_builder, path_in_repository, resume_on_failure, stream_hub
from chatmodel.runtime import UserError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)


def write_shards(folder: Path, shards: dict[str, list[str]], column: str = "text") -> str:
    for name, texts in shards.items():
        pq.write_table(pa.table({column: texts}), folder / f"{name}.parquet")
    return str(folder)


def stream_all(dataset: str, split: str) -> list[str]:
    return list(stream_hub(dataset, split, text_column="text"))


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
    assert list(stream_hub(dataset, "train", text_column="body")) == ["x"]


def test_unreachable_hub_says_what_to_do():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match=r"is no local folder, and the Hub cannot be reached.*--dataset embedded"):
        stream_all("nobody/nothing-of-this-name", "train")


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
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files), info=SimpleNamespace(splits=None))
    monkeypatch.setattr(hub, "open_builder", lambda name: builder)

    def describe(digest: str, revision: str) -> dict:
        siblings = [
            SimpleNamespace(rfilename="data/0.parquet", size=10, lfs=SimpleNamespace(sha256=digest), blob_id="b"),
            SimpleNamespace(rfilename="data/1.parquet", size=11, lfs=None, blob_id="c"),
            SimpleNamespace(rfilename="README.md", size=1, lfs=None, blob_id=revision),
        ]
        info = SimpleNamespace(sha=revision, siblings=siblings)
        monkeypatch.setattr(hub.HfApi, "dataset_info", lambda self, name, files_metadata: info)
        return describe_hub("owner/name")

    first = describe("d1", "r1")
    assert (first["name"], first["files"], first["revision"]) == ("owner/name", 2, "r1")
    assert describe("d1", "r2")["manifest"] == first["manifest"]  # a new README changes nothing
    assert describe("d2", "r2")["manifest"] != first["manifest"]
    builder.info.splits = {"train": SimpleNamespace(num_examples=7)}
    assert describe("d1", "r1")["documents"] == 7


def test_path_in_repository():
    assert path_in_repository("hf://datasets/owner/name@abc/data/train 0.parquet") == "data/train 0.parquet"
    assert path_in_repository("/local/file.parquet") == "/local/file.parquet"
