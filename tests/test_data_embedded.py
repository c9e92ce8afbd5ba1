"""The embedded corpus is found, cleaned, split by package, and cached."""

import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from chatmodel.data import embedded
from chatmodel.data.documentation import SourceFile, compose_documents, is_wanted, read_documents
from chatmodel.data.duplicates import WORD
from chatmodel.data.embedded import Document, ensure_embedded_corpus, find_versions, select_documents
from chatmodel.runtime import UserError

PACKAGES = {"train_packages": ("tqdm", "packaging", "not-installed-at-all"), "validation_packages": ("filelock",)}
SENTENCES = "\n".join(f"This is sentence number {n} of those that tell what the {n} things are for." for n in range(6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ensure_embedded_corpus(cache=tmp_path_factory.mktemp("cache"), **PACKAGES)


def read_split(folder: Path, split: str) -> list[dict[str, str]]:
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def test_splits_share_no_package_and_no_text(folder):
    train, validation = read_split(folder, "train"), read_split(folder, "validation")
    assert {row["source"] for row in train} == {"tqdm", "packaging"}
    assert {row["source"] for row in validation} == {"filelock"}
    texts = [row["text"] for row in train + validation]
    assert len(set(texts)) == len(texts)
    assert all(len(WORD.findall(text)) >= 40 for text in texts)


def test_text_is_prose(folder):
    text = "\n".join(row["text"] for row in read_split(folder, "train"))
    assert len(text) > 10_000
    for markup in (">>>", "```", ".. note", ":class:", "-----", "http://", "https://"):
        assert markup not in text, markup


def test_manifest_counts_and_hash_are_of_the_files(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in ("train", "validation"):
        rows = read_split(folder, split)
        assert manifest["documents"][split] == len(rows)
        assert manifest["bytes"][split] == sum(len(row["text"].encode()) for row in rows)
        assert sum(p["documents"] for p in manifest["packages"].values() if p["split"] == split) == len(rows)
    assert manifest["name"] == "embedded"
    assert len(manifest["manifest"]) == 64


def test_built_once_and_alike(folder, tmp_path, monkeypatch):
    other = ensure_embedded_corpus(cache=tmp_path, **PACKAGES)
    assert other.name == folder.name
    manifests = [json.loads((f / "manifest.json").read_text())["manifest"] for f in (folder, other)]
    assert manifests[0] == manifests[1]
    assert [p.name for p in tmp_path.iterdir()] == [other.name]  # nothing is left beside it

    monkeypatch.setattr(embedded, "build_corpus", lambda *_: pytest.fail("built again"))
    assert ensure_embedded_corpus(cache=tmp_path, **PACKAGES) == other


def test_a_damaged_cache_is_built_again(folder, tmp_path):
    cached = ensure_embedded_corpus(cache=tmp_path, **PACKAGES)
    (cached / "validation.parquet").unlink()
    ensure_embedded_corpus(cache=tmp_path, **PACKAGES)
    assert read_split(cached, "validation") == read_split(folder, "validation")


def test_key_follows_versions_and_splits():
    versions = find_versions({"tqdm": "train", "python": "train", "not-installed-at-all": "train"})
    assert set(versions) == {"tqdm", "python"}
    splits = dict.fromkeys(versions, "train")
    keys = {
        embedded.corpus_key(versions, splits),
        embedded.corpus_key(versions | {"tqdm": "0.0"}, splits),
        embedded.corpus_key(versions, splits | {"tqdm": "validation"}),
    }
    assert len(keys) == 3


def test_parallel_reading_gives_the_same(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(embedded, "MIN_PARALLEL_FILES", 1)
    with caplog.at_level(logging.INFO, "chatmodel"):
        parallel = ensure_embedded_corpus(cache=tmp_path, **PACKAGES)
    assert read_split(parallel, "train") == read_split(folder, "train")
    assert "embedded corpus" in caplog.text


def test_no_installed_package(tmp_path):
    with pytest.raises(UserError, match="no validation text"):
        ensure_embedded_corpus(cache=tmp_path, train_packages=("tqdm",), validation_packages=("not-installed-at-all",))


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        ensure_embedded_corpus(cache=tmp_path / "file", **PACKAGES)


def test_default_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert embedded.default_cache() == Path("/somewhere/chatmodel")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.default_cache() == Path.home() / ".cache" / "chatmodel"


def test_default_packages_are_disjoint_and_hold_no_benchmark():
    packages = [*embedded.TRAIN_PACKAGES, *embedded.VALIDATION_PACKAGES]
    assert len(set(packages)) == len(packages)
    assert not {"lm_eval", "lm-eval"}.intersection(packages)


def test_validation_loses_what_training_says():
    repeated = ("the same words in the same order are found in both of the splits of this small corpus " * 3).strip()
    documents = [
        Document(f"{repeated}\n\n{SENTENCES} with more words that only validation has", "b", "validation"),
        Document(repeated, "a", "train"),
    ]
    kept = {document.split: document.text for document in select_documents(documents)}
    assert kept["train"] == repeated
    assert repeated not in kept["validation"]
    assert "only validation has" in kept["validation"]


def write_source(tmp_path: Path, name: str, content: str) -> SourceFile:
    path = tmp_path / name
    path.write_text(content)
    return SourceFile("package", path, len(content))


def test_python_file_gives_a_document_for_each_definition(tmp_path):
    source = f'''"""{SENTENCES.replace("sentence", "module")}"""
class Thing:
    """{SENTENCES.replace("sentence", "class")}"""
    def method(self):
        """The method of the class that does all of it in the end."""
def short():
    """Too short for a document of its own."""
add_docstring(Thing, """{SENTENCES.replace("sentence", "literal")}""")
'''
    documents = read_documents(write_source(tmp_path, "thing.py", source))
    assert [d.split()[2] for d in documents] == ["module", "class", "literal"]
    assert documents[1].endswith("\n\nThe method of the class that does all of it in the end.")


def test_long_texts_are_cut_between_paragraphs():
    paragraphs = [
        f"{n}: " + "these are the words of a paragraph that is one of many of its kind " * 3 for n in range(12)
    ]
    documents = compose_documents(["\n\n".join(paragraphs[:7]), "- an item of this list\n- an item of that list"])
    assert [document.count("these are") // 3 for document in documents] == [5, 2]
    assert documents[1].endswith("\n\n- an item of this list\n- an item of that list")
    # A rest that is too short to stand alone stays with what it follows; alone it is dropped.
    rest = "This is but a sentence that follows the long text."
    assert [d.endswith(rest) for d in compose_documents(["\n\n".join(paragraphs[:5]), rest])] == [True]
    assert compose_documents([rest]) == []


def test_files_that_cannot_be_used_give_nothing(tmp_path):
    assert read_documents(write_source(tmp_path, "broken.py", f'def f(:\n    """{SENTENCES}"""')) == []
    assert read_documents(write_source(tmp_path, "bare.py", "x = 1")) == []
    assert read_documents(write_source(tmp_path, "sparse.py", "x = 1\n" * 2_000 + f'"""{SENTENCES}"""')) == []


def test_metadata_gives_the_readme_only(tmp_path):
    readme = write_source(tmp_path, "METADATA", f"Name: package\nSummary: a package\n\n{SENTENCES}")
    (document,) = read_documents(readme)
    assert document.startswith("This is sentence number 0")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("numpy/linalg/_linalg.py", True),
        ("numpy-2.0.dist-info/METADATA", True),
        ("numpy-2.0.dist-info/LICENSE.txt", False),
        ("numpy/linalg/tests/test_linalg.py", False),
        ("numpy/LICENSE.md", False),
        ("sklearn/datasets/descr/iris.rst", True),
        ("pip/_vendor/rich/text.py", False),
        ("transformers/models/bert/modular_bert.py", False),
        ("numpy/core.so", False),
        ("../../bin/tool.py", False),
    ],
)
def test_is_wanted(path, expected):
    assert is_wanted(Path(path)) is expected
