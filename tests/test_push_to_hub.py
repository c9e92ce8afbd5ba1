"""What is published of a run: to a folder, and to a stand-in for the Hub that keeps what it is sent."""

import base64
import importlib.util
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import yaml
from test_report_seed import seed_records, write_run
from transformers import AutoModelForCausalLM

from chatmodel.checkpoint import save_model_folder
from chatmodel.report.model_card import measured_shares, write_model_card
from chatmodel.runtime import UserError

SCRIPT = Path(__file__).parents[1] / "scripts" / "push_to_hub.py"


@pytest.fixture
def push_to_hub():
    specification = importlib.util.spec_from_file_location("push_to_hub", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(chat_model, tokenizer, tmp_path):
    records = seed_records()
    run = write_run(tmp_path / "run", records)
    save_model_folder(chat_model, tokenizer, run.folder("sft"), card=["A chat model of a test."])
    return run


class Hub:
    """The four calls an upload makes of the Hub's API; `files` are those of the last commit."""

    def __init__(self, *, status: int = 200) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, dict]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                self.answer(status, hub.handle(self.path, body) if status == 200 else {"error": "Forbidden"})

            def do_GET(self) -> None:
                self.answer(status, {"id": "me/model", "sha": "0" * 40, "siblings": []})

            def answer(self, code: int, value: dict) -> None:
                data = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("localhost", 0), Handler)
        self.address = f"http://localhost:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def handle(self, path: str, body: bytes) -> dict:
        if path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.files = {each["path"]: base64.b64decode(each["content"]) for each in files}
            return {"commitUrl": f"{self.address}/me/model/commit/1", "commitOid": "1", "success": True}
        asked = json.loads(body)
        self.asked.append((path, asked))
        if path.endswith("/preupload/main"):  # nothing goes to the storage for large files
            wanted = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked["files"]]
            return {"files": wanted}
        return {"url": f"{self.address}/me/model", "errors": [], "warnings": []}


@pytest.fixture
def hub(monkeypatch):
    made = []

    def start(**options) -> Hub:
        hub = Hub(**options)
        made.append(hub)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        api = huggingface_hub.HfApi(endpoint=hub.address, token="hf_test")
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
        return hub

    yield start
    for each in made:
        each.server.shutdown()
        each.server.server_close()


def start_script(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["push_to_hub.py", *map(str, arguments)])


def test_a_folder_holds_the_model_its_numbers_and_its_card(push_to_hub, run, tmp_path, monkeypatch, capsys):
    output = tmp_path / "published"
    start_script(monkeypatch, run.run_dir, "--stage", "sft", "--output", output)
    push_to_hub.main()
    assert capsys.readouterr().out == f"{output}\n"
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == 512
    assert {path.name for path in (output / "results").iterdir()} == {"sft.json", "sft_eval.json"}
    with pytest.raises(UserError, match="exists already"):
        push_to_hub.main()


def test_the_card_holds_the_numbers_of_the_run(run):
    card = write_model_card(run, "sft", name="me/model")
    header = yaml.safe_load(card.split("---")[1])
    metrics = run.read_result("sft_eval")["metrics"]
    expected = {name: round(share, 4) for name, share, _ in measured_shares(metrics)}
    assert len(expected) > 3
    (index,) = header["model-index"]
    found = {each["dataset"]["name"]: each["metrics"][0]["value"] for each in index["results"]}
    assert (index["name"], found) == ("model", expected)
    assert (header["library_name"], header["pipeline_tag"]) == ("transformers", "text-generation")
    assert card.partition("---\n\n")[2].startswith("# model\n\nA chat model of a test.\n\n## How to use it")
    assert 'pipeline("text-generation", "me/model", trust_remote_code=True)' in card
    for name, share in expected.items():
        assert f"| {name} | {share:.4f}" in card


def test_there_is_no_card_without_numbers(run):
    run.result_path("sft_eval").unlink()
    with pytest.raises(UserError, match=r"sft_eval of .* is not finished; finish it with: python recipes/eval.py"):
        write_model_card(run, "sft", name="me/model")


def test_an_upload(push_to_hub, hub, run, tmp_path, monkeypatch, capsys):
    server = hub()
    monkeypatch.setattr(push_to_hub, "HfApi", huggingface_hub.HfApi)
    start_script(monkeypatch, run.run_dir, "--repo", "me/model", "--private")
    push_to_hub.main()
    assert capsys.readouterr().out == f"{server.address}/me/model\n"
    (path, created), *_ = server.asked
    assert path == "/api/repos/create"
    assert (created["name"], created["organization"], created["visibility"]) == ("model", "me", "private")
    downloaded = tmp_path / "downloaded"
    for name, content in server.files.items():
        (downloaded / name).parent.mkdir(parents=True, exist_ok=True)
        (downloaded / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(downloaded).config.vocab_size == 512
    assert (downloaded / "README.md").read_text() == write_model_card(run, "sft", name="me/model")
    assert {"results/sft_eval.json", "modeling_gpt.py", "chat_template.jinja"} <= set(server.files)


def test_a_refusal_is_one_sentence(push_to_hub, hub, run, monkeypatch):
    hub(status=403)
    monkeypatch.setattr(push_to_hub, "HfApi", huggingface_hub.HfApi)
    start_script(monkeypatch, run.run_dir, "--repo", "me/model")
    with pytest.raises(UserError, match=r"me/model could not be published .*Forbidden.*; log in with `hf auth login`"):
        push_to_hub.main()


def test_nothing_is_left_behind(push_to_hub, run, tmp_path, monkeypatch):
    shutil.rmtree(run.folder("sft"))
    start_script(monkeypatch, run.run_dir, "--output", tmp_path / "published")
    with pytest.raises(UserError, match="holds no model any more"):
        push_to_hub.main()
    assert not (tmp_path / "published").exists()
