"""Local data: every format is read, divided and described, and every mistake is named."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatmodel.data import files as files_module
from chatmodel.data.corpus import stream_documents
from chatmodel.data.files import (
    MAX_TEXT_DOCUMENT,
    MIN_TEXT_DOCUMENT,
    DamagedFile,
    describe_files,
    find_data_files,
    hash_file,
    is_validation,
    list_files,
    plan_row_groups,
    read_parquet,
    read_texts,
    split_files,
)
from chatmodel.runtime import UserError

TEXTS = ["first", "second\nwith a line", "dritte Übung 文"]


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=2)
    return path


def write_jsonl(path: Path, rows: list) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read_all(path: Path, text_column: str = "text") -> list[str]:
    return list(read_texts(path, text_column=text_column))


def stream_all(dataset: Path, split: str, text_column: str = "text") -> list[str]:
    return list(stream_documents(str(dataset), split, text_column=text_column))


def test_every_format_gives_the_texts(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    assert read_all(write_parquet(tmp_path / "a.parquet", [*TEXTS, None])) == TEXTS
    assert read_all(write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": None}])) == TEXTS
    assert read_all(write_jsonl(tmp_path / "a.jsonl.gz", rows)) == TEXTS
    assert read_all(write_parquet(tmp_path / "b.parquet", TEXTS, column="body"), "body") == TEXTS
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\n<|endoftext|>\nthree\n", encoding="utf-8")
    assert read_all(tmp_path / "a.txt") == ["one\n\ntwo", "three"]


def test_text_is_cut_at_blank_lines(tmp_path):
    paragraph = "a" * (MIN_TEXT_DOCUMENT // 2) + "\n\n"
    endless = "b" * 99 + "\n"
    path = tmp_path / "a.txt"
    path.write_text(paragraph * 5 + endless * (MAX_TEXT_DOCUMENT // 100 + 3))
    sizes = [len(text) for text in read_all(path)]
    # Two paragraphs reach the minimum; the fifth meets lines that have no blank among them, up to the maximum.
    assert sizes[:2] == [len(paragraph) * 2 - 2] * 2
    assert MAX_TEXT_DOCUMENT <= sizes[2] <= MAX_TEXT_DOCUMENT + 100
    assert len(sizes) == 4
    assert sum(text.count("b") for text in read_all(path)) == 99 * (MAX_TEXT_DOCUMENT // 100 + 3)


def test_last_shard_is_validation(tmp_path):
    for number, text in enumerate(TEXTS):
        write_parquet(tmp_path / "deep" / f"shard_{number}.parquet", [text])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".cache").mkdir()
    write_parquet(tmp_path / ".cache" / "z.parquet", ["hidden"])
    assert stream_all(tmp_path, "train") == TEXTS[:2]
    assert stream_all(tmp_path, "validation") == TEXTS[2:]


def test_named_validation_files(tmp_path):
    names = ["train-0.parquet", "train-1.parquet", "test-0.parquet", "validation-0.parquet", "devices.parquet"]
    files = sorted(tmp_path / name for name in names)
    train, by_hash = split_files(files, "train", root=tmp_path)
    assert [f.name for f in train] == ["devices.parquet", "train-0.parquet", "train-1.parquet"]
    assert not by_hash
    assert [f.name for f in split_files(files, "validation", root=tmp_path)[0]] == ["validation-0.parquet"]
    nested = [tmp_path / "train" / "a.txt", tmp_path / "val" / "a.txt"]
    assert split_files(nested, "validation", root=tmp_path) == (nested[1:], False)


def test_single_file_is_divided_by_hash(tmp_path):
    texts = [f"document {n}" for n in range(2_000)] + [""]
    path = write_parquet(tmp_path / "all.parquet", texts)
    train, validation = stream_all(path, "train"), stream_all(tmp_path, "validation")
    assert sorted([*train, *validation]) == sorted(texts[:-1])  # nothing lost but the empty one, nothing twice
    assert 5 <= len(validation) <= 40  # 1 % of 2,000, give or take four standard deviations
    assert all(is_validation(text) for text in validation)


def test_text_files_are_no_shards(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n\n".join(f"{name} {n} " + "x" * MIN_TEXT_DOCUMENT for n in range(150)))
    validation = stream_all(tmp_path, "validation")
    assert {text[0] for text in [*validation, *stream_all(tmp_path, "train")]} == {"a", "b"}
    assert 0 < len(validation) < 20


def test_is_validation_is_a_fixed_function():
    assert is_validation("x", share=1.0)
    assert not is_validation("x", share=0.0)
    assert is_validation("\ud800", share=1.0)  # a lone surrogate, as JSON can hold, is no error
    # sha256("abc") begins with ba78, and 0xba78 / 2**16 = 0.72839...
    assert not is_validation("abc", share=0.728)
    assert is_validation("abc", share=0.729)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "does not exist"),
        (lambda folder: folder, "is empty"),
        (lambda folder: [folder, (folder / "notes.pdf").touch()][0], "no file that can be read, only notes.pdf"),
        (lambda folder: [folder / "x.csv", (folder / "x.csv").touch()][0], "is no .parquet, .jsonl"),
    ],
)
def test_nothing_to_read(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        find_data_files(str(make(tmp_path)))


def test_missing_column_names_the_columns_there_are(tmp_path):
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text', only id, body"):
        read_all(write_parquet(tmp_path / "a.parquet", TEXTS, column="body"))
    rows = [{"text": "good"}, {"body": "bad", "id": 3}]
    with pytest.raises(UserError, match=r"line 2 of .*a\.jsonl has no column 'text', only body, id"):
        read_all(write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match="no columns at all"):
        read_all(write_jsonl(tmp_path / "b.jsonl", [["text"]]))


def test_column_of_another_type(tmp_path):
    with pytest.raises(UserError, match=r"column 'id' of .* holds int64, not text"):
        read_all(write_parquet(tmp_path / "a.parquet", TEXTS), "id")
    with pytest.raises(UserError, match=r"column 'text' in line 1 of .* holds list, not text"):
        read_all(write_jsonl(tmp_path / "a.jsonl", [{"text": ["a"]}]))


def test_damaged_parquet_is_named(tmp_path):
    whole = write_parquet(tmp_path / "a.parquet", [text * 500 for text in TEXTS]).read_bytes()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole[: len(whole) // 2])
    flipped = tmp_path / "flipped.parquet"
    flipped.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    for path in (cut, flipped):
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            read_all(path)
    with pytest.raises(UserError, match=r"cut\.parquet is damaged"):
        describe_files(str(cut))


def test_flipped_bits_are_found_in_pages_with_checksums(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, write_page_checksum=True, compression="none")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"second", b"sekond", 1))
    with pytest.raises(UserError, match=r"a\.parquet is damaged .*CRC"):
        read_all(path)


def test_row_groups_are_read_in_runs(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    texts = [f"{n} " + "x" * 1_000 for n in range(20)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=3, use_dictionary=False, write_statistics=False)
    monkeypatch.setattr(files_module, "PIECE_BYTES", 7_000)
    runs = plan_row_groups(path, "text")
    assert runs == [[0, 1], [2, 3], [4, 5], [6]]  # of about 3,100 bytes each
    assert [text for run in runs for text in read_parquet(path, "text", run)] == texts
    assert plan_row_groups(path, "body") is None  # reading says what there is
    monkeypatch.setattr(files_module, "MAX_ROW_GROUP_BYTES", 3_000)
    assert plan_row_groups(path, "text") is None


def test_damaged_text_is_named(tmp_path):
    whole = write_jsonl(tmp_path / "a.jsonl.gz", [{"text": text * 100} for text in TEXTS]).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz is cut short"):
        read_all(tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"no\.jsonl\.gz is cut short or damaged"):
        read_all(tmp_path / "no.jsonl.gz")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n\n{"text": "b"\n')
    with pytest.raises(UserError, match=r"line 3 of .*broken\.jsonl is not JSON"):
        read_all(tmp_path / "broken.jsonl")
    (tmp_path / "latin.txt").write_bytes("Müller".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
        read_all(tmp_path / "latin.txt")


def test_a_file_that_cannot_be_read_is_listed_without_a_hash(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(DamagedFile, match=r"cannot be read \(Is a directory\)"):
        hash_file(tmp_path)
    monkeypatch.setattr(files_module, "hash_file", lambda file: hash_file(tmp_path))  # as from a failing disk
    assert list_files(str(tmp_path))[0]["sha256"] is None


def test_a_damaged_file_can_be_left_out_of_the_count(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"b\.parquet is damaged"):
        describe_files(str(tmp_path))
    description = describe_files(str(tmp_path), ignore_damage=True)
    assert "documents" not in description
    assert description["files"] == 2


def test_description_follows_names_and_contents(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write_parquet(folder / "a.parquet", TEXTS)
        write_parquet(folder / "b.parquet", TEXTS[:1])
    description = describe_files(str(one))
    assert description["documents"] == 4
    assert description["files"] == 2
    assert description["name"] == str(one)
    assert description["validation"] == "b.parquet"
    assert describe_files(str(two))["manifest"] == description["manifest"]  # where it lies does not matter
    (two / "b.parquet").rename(two / "c.parquet")
    renamed = describe_files(str(two))["manifest"]
    write_parquet(two / "c.parquet", ["other"])
    changed = describe_files(str(two))["manifest"]
    assert len({description["manifest"], renamed, changed}) == 3
    (tmp_path / "a.txt").write_text("text")
    assert "documents" not in describe_files(str(tmp_path / "a.txt"))
