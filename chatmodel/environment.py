"""What a result was made with: code, hardware, software."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

REPORTED_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "trl",
    "peft",
    "lm_eval",
    "evaluate",
)


def describe_environment() -> dict[str, Any]:
    """Facts for the report: code version, hardware, software."""
    return {"git": describe_git(), "hardware": describe_hardware(), "software": describe_software()}


def describe_git() -> dict[str, Any]:
    """Branch, commit, first line of its message, and whether files differ from it; empty outside a checkout."""

    def ask(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = ask("rev-parse", "--short", "HEAD")
    if commit is None:
        return {}
    return {
        "branch": ask("rev-parse", "--abbrev-ref", "HEAD"),
        "commit": commit,
        "message": ask("log", "-1", "--format=%s"),
        "dirty": bool(ask("status", "--porcelain")),
    }


def describe_hardware() -> dict[str, Any]:
    """Platform, cores, memory and accelerators of this machine."""
    facts: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": psutil.cpu_count(logical=True),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [],
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts["gpus"].append({"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)})
    if torch.backends.mps.is_available():
        facts["gpus"].append({"name": "Apple MPS", "memory_gib": facts["memory_gib"]})
    return facts


def describe_software() -> dict[str, Any]:
    """Versions of Python, CUDA and the packages a result depends on."""
    versions: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in REPORTED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
