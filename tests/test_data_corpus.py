"""One name, three places: which of them a data set is taken from."""

import importlib.metadata

import pytest

from chatmodel.data import corpus, embedded
from chatmodel.data.corpus import describe_corpus, is_hub_name, stream_documents
from chatmodel.data.embedded import ensure_embedded_corpus
from chatmodel.runtime import UserError


@pytest.fixture
def small_embedded(tmp_path, monkeypatch):
    """The embedded corpus of two small packages."""
    folder = ensure_embedded_corpus(cache=tmp_path, train_packages=("tqdm",), validation_packages=("filelock",))
    for module in (corpus, embedded):
        monkeypatch.setattr(module, "ensure_embedded_corpus", lambda: folder)
    return folder


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("karpathy/climbmix-400b-shuffle")
    assert is_hub_name("HuggingFaceFW/fineweb-edu:sample-10BT")
    assert is_hub_name("owner/name@refs/convert/parquet")
    for path in ("./data/text", "../data", "/data/text", "data", "data/deep/text", "embedded"):
        assert not is_hub_name(path), path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_name("owner/name")  # what exists is local


def test_local_and_missing(tmp_path):
    (tmp_path / "text.txt").write_text("just this")
    texts = [*stream_documents(str(tmp_path), "train"), *stream_documents(str(tmp_path), "validation")]
    assert texts == ["just this"]
    with pytest.raises(UserError, match="does not exist"):
        list(stream_documents(str(tmp_path / "missing"), "train"))
    with pytest.raises(UserError, match="does not exist"):
        describe_corpus("missing")


def test_hub_is_asked_for_hub_names(monkeypatch):
    monkeypatch.setattr(corpus, "open_hub_split", lambda *args, **kwargs: iter([(args, kwargs)]))
    assert list(stream_documents("owner/name", "train", text_column="body")) == [
        (("owner/name", "train"), {"text_column": "body"})
    ]
    monkeypatch.setattr(corpus, "describe_hub", lambda name: {"name": name})
    assert describe_corpus("owner/name") == {"name": "owner/name"}


def test_embedded(small_embedded):
    train, validation = (list(stream_documents("embedded", split)) for split in ("train", "validation"))
    assert len(train) > 5
    assert len(validation) > 5
    assert not set(train).intersection(validation)
    description = describe_corpus("embedded")
    assert description["name"] == "embedded"
    assert description["documents"] == {"train": len(train), "validation": len(validation)}
    assert description["packages"]["train"] == f"tqdm {importlib.metadata.version('tqdm')}"
    assert description["packages"]["validation"].startswith("filelock ")


def test_unknown_split():
    with pytest.raises(ValueError, match="test"):
        stream_documents("embedded", "test")
