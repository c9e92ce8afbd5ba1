"""What is this machine, what will training use here, and what is in its way? `python scripts/doctor.py`

The output is meant to be pasted into a bug report. Exit code 0: training can run; 1: it cannot, and why.
"""

import importlib.metadata
import importlib.util
import os
import platform
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL_PACKAGES = ("triton", "flash_attn", "flash_attn.cute", "flash_attn_interface", "torchao", "vllm", "wandb")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "i8mm")
HUB_SECONDS = 3.0
LEAST_DISK_GIB, LEAST_MEMORY_GIB = 1.0, 2.0

Facts = Iterator[tuple[str, str]]


class Report:
    """What was found, printed at once, and what stands in the way of training."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def show(self, title: str, facts: Facts) -> None:
        print(f"\n{title}")
        for name, text in facts:
            print(f"  {name + ':':<34} {text}", flush=True)

    def finish(self) -> int:
        print()
        for sentence in self.warnings:
            print(f"note: {sentence}")
        for sentence in self.problems:
            print(f"problem: {sentence}")
        print("training cannot run here" if self.problems else "training can run here")
        return 1 if self.problems else 0


def ask(*command: str) -> str | None:
    """What a program prints, or None."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def shorten(path: Path) -> str:
    """A path from the project or the home folder on: a bug report need not say whose that is."""
    for root, name in ((ROOT, "."), (Path.home(), "~")):
        if path.is_relative_to(root):
            return str(name / path.relative_to(root))
    return str(path)


def find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_packages(report: Report) -> Facts:
    """Versions beside what the project requires, and beside what it is tested with."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        report.problems.append(f"{sys.executable} has none of the project's packages; run scripts/setup.sh")
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield "Python", f"{platform.python_version()} at {shorten(Path(sys.executable))}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        report.problems.append(f"Python {platform.python_version()} is none of 3.11 to 3.13; run scripts/setup.sh")
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    tested = dict(line.split("==") for line in lines if line.count("==") == 1)
    for requirement in map(Requirement, [*project["dependencies"], "chatmodel"]):
        version = find_version(requirement.name)
        wanted = tested.get(requirement.name.lower().replace("_", "-"))
        if version is None:
            report.problems.append(f"{requirement.name} is not installed; run scripts/setup.sh")
        elif not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            wrong = f"{requirement.name} {version} is not {requirement.specifier}"
            report.problems.append(f"{wrong}; run scripts/setup.sh")
        as_tested = version is None or wanted is None or version.partition("+")[0] == wanted
        remark = "" if as_tested else f" (tested: {wanted})"
        yield requirement.name, f"{version or 'missing'}{remark}"
    for name in OPTIONAL_PACKAGES:
        yield f"{name} (optional)", describe_optional(name)


def describe_optional(module: str) -> str:
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    return "not installed" if not found else find_version(module.partition(".")[0].replace("_", "-")) or "there"


def read_cpu() -> tuple[str, list[str]]:
    """The processor's name and those of its flags that matter for matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ask("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or "unknown", []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return facts.get("model name", platform.machine()), [flag for flag in CPU_FLAGS if flag in flags]


def describe_machine(report: Report, folder: Path) -> Facts:
    import psutil

    from chatmodel.devices import host_memory_bytes
    from chatmodel.estimate.prediction import free_disk_bytes

    name, flags = read_cpu()
    yield "system", platform.platform()
    yield "CPU", f"{name}, {psutil.cpu_count(logical=False)} cores, {os.cpu_count()} threads"
    yield "CPU flags", " ".join(flags) or "unknown"
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "this process may use", f"{allowed} threads, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    yield "load", f"{load:.1f}"
    if load > (os.cpu_count() or 1) / 2:
        report.warnings.append(f"others use this machine (load {load:.1f}): the speeds above could be higher")
    memory, free = host_memory_bytes() / 2**30, psutil.virtual_memory().available / 2**30
    yield "memory", f"{memory:.1f} GiB, {free:.1f} free"
    if memory < LEAST_MEMORY_GIB:
        report.problems.append(f"{memory:.1f} GiB of memory are less than the {LEAST_MEMORY_GIB} that any model needs")
    disk = free_disk_bytes(folder) / 2**30
    yield f"disk of {shorten(folder)}", f"{disk:.1f} GiB free"
    if disk < LEAST_DISK_GIB:
        report.problems.append(f"{disk:.1f} GiB are free for {shorten(folder)}; a run needs {LEAST_DISK_GIB} or more")


def describe_gpus(report: Report) -> Facts:
    import torch

    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if driver:
        yield "driver", driver.splitlines()[0]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield (
            f"GPU {index}",
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, {total / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} free, {facts.multi_processor_count} multiprocessors",
        )
    if driver and not torch.cuda.is_available():
        report.warnings.append(
            "there is an NVIDIA GPU that this torch cannot use (built without CUDA, or for another driver), so the "
            "CPU would train; run scripts/setup.sh anew, or see https://pytorch.org/get-started"
        )
    if torch.backends.mps.is_available():
        yield "GPU", "Apple MPS"
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        yield "GPU", "none that torch can use"


def describe_network() -> Facts:
    from accelerate.commands.config import default_config_file
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    yield "cache of the Hub", f"{shorten(cache)} ({'there' if cache.exists() else 'not made yet'})"
    offline = "not asked (offline mode)"
    yield constants.ENDPOINT, offline if constants.HF_HUB_OFFLINE else ask_hub(constants.ENDPOINT)
    own = Path(default_config_file)
    used = "there, used by `accelerate launch` without --config_file" if own.exists() else "not there"
    yield "Accelerate, your own file", f"{shorten(own)}, {used}"
    yield "Accelerate, this project's", "there" if (ROOT / "accelerate_config.yaml").exists() else "missing"
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "free port on 127.0.0.1", f"{server.getsockname()[1]} (for several processes)"


def ask_hub(endpoint: str) -> str:
    began = time.monotonic()
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS)
    except urllib.error.HTTPError as error:
        return f"answers with {error.code}"
    except (OSError, ValueError) as error:
        return f"no answer within {HUB_SECONDS:.0f} s ({error}); use a local --dataset or 'embedded'"
    return f"answers in {time.monotonic() - began:.1f} s"


def describe_tokenizers(report: Report) -> Facts:
    """Encode a text there and back with each library that a stage needs."""
    from chatmodel.probes import run_probe
    from chatmodel.tokenizer import build_encoding, train_tokenizer

    def encode() -> str:
        texts = [f"{number} and {number * 7}" for number in range(300)]
        tokenizer = train_tokenizer(texts, 300, max_chars=10_000, doc_cap=1000)
        ids = build_encoding(tokenizer).encode_ordinary(texts[9])
        if tokenizer.decode(ids) != texts[9]:
            raise ArithmeticError("decoding gives another text")
        return "a vocabulary trained (rustbpe), a text encoded (tiktoken) and decoded (tokenizers)"

    probe = run_probe("tokenizer", encode)
    if not probe.works:
        report.problems.append(f"tokenizers do not work: {probe.text}")
    yield probe.name, probe.text


def describe_training(report: Report) -> Facts:
    import torch

    from chatmodel.devices import choose_device, choose_precision
    from chatmodel.probes import probe_device, probe_host

    device = choose_device()
    precision = choose_precision(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    yield "device", f"{device} (used)"
    reason = "faster here than fp32, or as fast with half the memory" if precision == "bf16" else "no faster bf16 here"
    yield "precision", f"{'bf16' if precision == 'bf16' else 'fp32'} (used: {reason})"
    for probe in (*probe_host(), *probe_device(device, dtype)):
        yield probe.name, probe.text
        if not probe.works and probe.name in ("training step", "loss"):
            report.problems.append(f"{probe.name} {probe.text}")
        elif not probe.works and probe.name == "torch.compile":
            report.warnings.append(f"torch.compile {probe.text}; pretrain with --compile false, which is slower")


def main() -> int:
    report = Report()
    commit = ask("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    print(f"chatmodel doctor, {time.strftime('%Y-%m-%d %H:%M')}, commit {commit or 'unknown'}")
    report.show("Packages", describe_packages(report))
    if report.problems:  # without its packages there is nothing to try
        return report.finish()
    report.show("Machine", describe_machine(report, ROOT / "runs"))
    report.show("GPU", describe_gpus(report))
    report.show("Hub and processes", describe_network())
    report.show("Tokenizers", describe_tokenizers(report))
    report.show("Training", describe_training(report))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
