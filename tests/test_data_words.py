"""Words to spell and to count letters in."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatmodel.data import words
from chatmodel.data.words import harvest_words, is_held_out, load_words, read_words
from chatmodel.runtime import UserError


def write_corpus(folder: Path, train: dict[str, str], validation: dict[str, str]) -> Path:
    for split, texts in (("train", train), ("validation", validation)):
        table = pa.table({"source": list(texts), "text": list(texts.values())})
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def test_harvest_takes_frequent_words_of_several_packages(tmp_path):
    corpus = write_corpus(
        tmp_path,
        {"a": "The window and the Window: windows! gadget gadget gadget.", "b": "jargon, jargon. jargon, once twice"},
        {"c": "a window; gadget twice twice: windows windows"},
    )
    # the: 2 times; window: 3 in two packages; windows 3, gadget 4, twice 3; jargon in one package; once: 1 time.
    assert harvest_words(corpus) == ["gadget", "twice", "window", "windows"]
    assert "jargon" in harvest_words(corpus, min_packages=1)


def test_harvest_leaves_parts_of_names_out(tmp_path):
    code = (
        "snake_case camelCase module.attribute call(argument) path/inside x-ray don't naïve HTTP Thing2 <tag> --flag "
    )
    corpus = write_corpus(
        tmp_path, {"a": code * 5 + "sentence ends here. " * 3}, {"b": code * 5 + "sentence ends here."}
    )
    assert harvest_words(corpus) == ["argument", "ends", "here", "sentence"]


def test_harvest_keeps_the_most_frequent(tmp_path, monkeypatch):
    monkeypatch.setattr(words, "MAX_WORDS", 2)
    corpus = write_corpus(tmp_path, {"a": "zeta zeta zeta beta beta alpha alpha"}, {"b": "zeta beta alpha"})
    assert harvest_words(corpus) == ["alpha", "zeta"]  # beta is as frequent as alpha, and comes after it


def test_embedded_words_come_from_the_embedded_corpus(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path, {"a": "some words some words"}, {"b": "some words"})
    monkeypatch.setattr(words, "ensure_embedded_corpus", lambda: corpus)
    assert load_words("embedded") == ["some", "words"]


@pytest.mark.parametrize("name", ["words.txt", "words.txt.gz"])
def test_word_list(tmp_path, name):
    content = b"pear\napple\nApple\nit\nunder-score\nabcdefghijkl\nabcdefghijklm\napple\n\n caf\xc3\xa9\n plum \n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert load_words(str(path)) == ["abcdefghijkl", "apple", "pear", "plum"]


def test_bad_word_lists(tmp_path):
    with pytest.raises(UserError, match=r"word list .*none\.txt does not exist"):
        load_words(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("A\n12\n")
    with pytest.raises(UserError, match=r"empty\.txt has no word of 3 to 12"):
        load_words(str(tmp_path / "empty.txt"))
    (tmp_path / "plain.txt.gz").write_text("not packed")
    with pytest.raises(UserError, match=r"plain\.txt\.gz cannot be read"):
        load_words(str(tmp_path / "plain.txt.gz"))
    with pytest.raises(UserError, match="cannot be read"):
        load_words(str(tmp_path))


def test_one_word_in_five_is_held_out():
    made = [a + b + c for a in "abcdefghij" for b in "aeiou" for c in "klmnopqrst"]
    share = sum(map(is_held_out, made)) / len(made)
    assert 0.15 < share < 0.25
    # sha256("hello") begins with 2cf2, sha256("abc") with ba78; a fifth of the hashes lies below 3333.
    assert is_held_out("hello")
    assert not is_held_out("abc")


@pytest.mark.data
def test_real_word_list(data_root):
    found = read_words(data_root / "chatcore" / "words_alpha.txt.gz")
    assert len(found) > 200_000
    assert found == sorted(set(found))
