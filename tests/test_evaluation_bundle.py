"""The bundle from an address (a server of our own), a zip file and a folder; checksums; what is refused."""

import hashlib
import http.server
import threading
import zipfile

import pytest

from chatmodel.evaluation.bundle import OFFICIAL_DATA, describe_bundle, find_bundle, hash_data, open_bundle
from chatmodel.runtime import UserError


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "served" / "eval_bundle.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("eval_bundle/core.yaml", "icl_tasks: []\n")
        file.writestr("eval_bundle/eval_data/some/b.jsonl", "{}\n")
        file.writestr("eval_bundle/eval_data/a.jsonl", "[]\n")
    return path


@pytest.fixture
def server(archive):
    """(address, what was asked for); `/short.zip` announces more than it gives."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(archive.parent))

        def do_GET(self):
            asked.append(self.path)
            if self.path != "/short.zip":
                super().do_GET()
                return
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_address_is_downloaded_once_and_checked(server, archive, tmp_path):
    address, asked = server
    cache = tmp_path / "cache"
    wanted = f"{address}/eval_bundle.zip#sha256={digest(archive).upper()}"
    path = find_bundle(wanted, cache=cache)
    assert path.read_bytes() == archive.read_bytes()
    assert find_bundle(wanted, cache=cache) == find_bundle(f"{address}/eval_bundle.zip", cache=cache) == path
    assert asked == ["/eval_bundle.zip"]
    assert [file.name for file in cache.iterdir()] == [path.name]
    # A cached file that has changed since is noticed.
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="delete the file and fetch it anew"):
        find_bundle(wanted, cache=cache)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/eval_bundle.zip#sha256=" + "0" * 64, "correct the address or checksum"),
        ("/missing.zip", "cannot be downloaded.*404.*curl -LO"),
        ("/short.zip", "gave 4 of 1000 bytes"),
    ],
)
def test_what_is_not_the_file_is_not_kept(server, tmp_path, place, message):
    with pytest.raises(UserError, match=message):
        find_bundle(server[0] + place, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_server_that_is_away(tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded"):
        find_bundle("http://127.0.0.1:9/x.zip", cache=tmp_path)


def test_a_zip_file_may_carry_its_checksum(archive):
    assert find_bundle(f"{archive}#sha256={digest(archive)}") == archive
    with pytest.raises(UserError, match=f"has the sha256 {digest(archive)}, not 12"):
        find_bundle(f"{archive}#sha256=12")
    with pytest.raises(UserError, match="is a folder"):
        find_bundle(f"{archive.parent}#sha256=12")


def test_data_is_told_by_its_files_wherever_they_lie(archive, tmp_path, caplog):
    # By hand: names in order, each with the sha256 of its content.
    expected = hashlib.sha256()
    for name, content in (("a.jsonl", b"[]\n"), ("some/b.jsonl", b"{}\n")):
        expected.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    assert hash_data(open_bundle(archive) / "eval_data") == expected.hexdigest()
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "folder")
    assert describe_bundle(tmp_path / "folder") == {"data_sha256": expected.hexdigest(), "is_official": False}
    assert "not nanochat's bundle" in caplog.text


@pytest.mark.data
def test_the_official_data_is_known(data_root):
    found = describe_bundle(find_bundle(data_root / "eval_bundle.zip"))
    assert found == {"data_sha256": OFFICIAL_DATA, "is_official": True}
