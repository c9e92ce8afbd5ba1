import gzip
import json

import pytest
from datasets import Dataset

from chatmodel.conversations.files import convert_row, read_rows
from chatmodel.runtime import UserError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write_jsonl(path, rows):
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_each_layout_gives_the_same_rows(tmp_path, name):
    rows = [{"messages": TALK}, {"messages": TALK + TALK}]
    path = tmp_path / name
    if name.endswith("parquet"):
        Dataset.from_list(rows).to_parquet(str(path))
    elif name.endswith("json"):
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    found = read_rows(path)
    assert [convert_row(row) for row in found.rows] == [TALK, TALK + TALK]
    assert found.locate(1) == f"{path}, row 2"


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"messages": TALK}])
    write_jsonl(tmp_path / "a.jsonl.gz", [{"messages": TALK + TALK}, {"messages": TALK}])
    (tmp_path / "README.md").write_text("not data")
    found = read_rows(tmp_path)
    assert [len(row["messages"]) for row in found.rows] == [4, 2, 2]
    assert [found.locate(i) for i in range(3)] == [
        f"{tmp_path / 'a.jsonl.gz'}, row 1",
        f"{tmp_path / 'a.jsonl.gz'}, row 2",
        f"{tmp_path / 'b.jsonl'}, row 1",
    ]


def test_a_folder_of_parquet_files_stays_on_the_disk(tmp_path):
    for name in "ab":
        Dataset.from_list([{"messages": TALK}]).to_parquet(str(tmp_path / f"{name}.parquet"))
    found = read_rows(tmp_path)
    assert isinstance(found.rows, Dataset)
    assert [convert_row(row) for row in found.rows] == [TALK, TALK]


@pytest.mark.parametrize(
    "row",
    [
        TALK,
        {"messages": TALK, "source": "x"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "input": None, "output": "Hello"},
    ],
)
def test_layouts_of_a_row(row):
    assert convert_row(row) == TALK


def test_alpaca_input_follows_the_instruction():
    row = {"instruction": "Sort:", "input": "b a", "output": "a b"}
    assert convert_row(row)[0]["content"] == "Sort:\n\nb a"


def test_sharegpt_system():
    row = {"conversations": [{"from": "system", "value": "Be kind."}]}
    assert convert_row(row) == [{"role": "system", "content": "Be kind."}]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "Hi"}, r"no conversation in it \(found: text\)"),
        ("Hi", r"found: str"),
        ({"messages": "Hi"}, "found: messages"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "from 'tool'"),
        ({"conversations": [{"value": "x"}]}, "not of the form"),
    ],
)
def test_rows_without_a_conversation(row, complaint):
    with pytest.raises(UserError, match=complaint):
        convert_row(row)


def test_what_cannot_be_read_is_named(tmp_path):
    def check(name: str, content: bytes, complaint: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=complaint) as caught:
            read_rows(path)
        assert str(path) in str(caught.value)

    check("a.csv", b"x", "unknown ending")
    check("a.jsonl", b"", "is empty")
    check("a.json", b"[]", "is empty")
    check("a.json", b"{}", "no list")
    check("a.json", b"[", "not valid JSON")
    check("b.jsonl", b"{}\n\n{nonsense\n", "line 3 is not valid JSON")
    check("c.jsonl", b"\xff\xfe\n", "damaged")
    check("a.jsonl.gz", b"not gzip", "damaged")
    check("b.jsonl.gz", gzip.compress(json.dumps(TALK).encode() * 99)[:-20], "damaged")
    check("a.parquet", b"PAR1 nonsense", "damaged")
    with pytest.raises(UserError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        read_rows(tmp_path / "empty")
