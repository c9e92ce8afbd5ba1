"""The doctor: what it says of packages, the Hub and problems, and its exit code."""

import http.server
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "doctor.py"


@pytest.fixture(scope="module")
def doctor():
    specification = importlib.util.spec_from_file_location("doctor", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def report(doctor):
    return doctor.Report()


def test_this_environment_has_no_problem(doctor, report):
    found = dict(doctor.describe_packages(report))
    assert report.problems == []
    assert found["transformers"]
    assert report.finish() == 0


def test_missing_and_wrong_packages_are_problems(doctor, report, monkeypatch, capsys):
    versions = {"torch": "1.0", "tiktoken": None}
    monkeypatch.setattr(doctor, "find_version", lambda name: versions.get(name, "999") if name in versions else "5.23")
    found = dict(doctor.describe_packages(report))
    assert found["tiktoken"].startswith("missing")
    assert "tested:" in found["torch"]
    assert "torch 1.0 is not >=2.11; run scripts/setup.sh" in report.problems
    assert "tiktoken is not installed; run scripts/setup.sh" in report.problems
    assert report.finish() == 1
    assert capsys.readouterr().out.endswith("training cannot run here\n")


def test_a_full_disk_is_a_problem(doctor, report, monkeypatch):
    monkeypatch.setattr("chatmodel.estimate.prediction.free_disk_bytes", lambda folder: 2**20)
    found = dict(doctor.describe_machine(report, SCRIPT.parent))
    assert found["disk of scripts"] == "0.0 GiB free"
    assert any("a run needs 1.0 or more" in problem for problem in report.problems)


@pytest.fixture
def endpoint():
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(503 if "busy" in self.path else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_hub_is_asked(doctor, endpoint, monkeypatch):
    assert doctor.ask_hub(endpoint).startswith("answers in")
    assert doctor.ask_hub(f"{endpoint}/busy") == "answers with 503"
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.5)
    assert doctor.ask_hub("http://127.0.0.1:9").startswith("no answer within")


def test_tokenizers_are_tried(doctor, report, monkeypatch):
    assert "encoded" in dict(doctor.describe_tokenizers(report))["tokenizer"]
    assert report.problems == []

    def fail(*_: object, **__: object) -> None:
        raise ImportError("no rust here")

    monkeypatch.setattr("chatmodel.tokenizer.train_tokenizer", fail)
    list(doctor.describe_tokenizers(report))
    assert report.problems == ["tokenizers do not work: fails: ImportError: no rust here"]


def test_a_failing_training_step_is_a_problem_and_a_failing_compiler_is_not(doctor, report, monkeypatch):
    from chatmodel.probes import Probe

    monkeypatch.setattr("chatmodel.probes.probe_host", list)
    found = [Probe("torch.compile", False, "fails: no compiler"), Probe("training step", False, "fails: nan")]
    monkeypatch.setattr("chatmodel.probes.probe_device", lambda device, dtype: found)
    assert dict(doctor.describe_training(report))["training step"] == "fails: nan"
    assert report.problems == ["training step fails: nan"]
    assert "--compile false" in report.warnings[0]


def test_paths_do_not_say_whose_they_are(doctor):
    assert doctor.shorten(Path.home() / "x") == "~/x"
    assert doctor.shorten(doctor.ROOT / "runs") == "runs"
    assert doctor.shorten(Path("/elsewhere/x")) == "/elsewhere/x"


@pytest.mark.slow
def test_the_whole_report():
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for title in ("Packages", "Machine", "GPU", "Hub and processes", "Tokenizers", "Training"):
        assert f"\n{title}\n" in done.stdout
    assert "fails" not in done.stdout
    assert done.stdout.endswith("training can run here\n")
