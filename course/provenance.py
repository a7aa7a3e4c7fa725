"""Where a recorded figure comes from: machine, versions, commit, date."""

import datetime
import importlib.metadata
import os
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers")


def provenance() -> dict[str, str | None]:
    """Return what every recorded result names beside its figures."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        **versions,
        "commit": source_commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def source_commit() -> str | None:
    """Return the commit of the code that runs: from GIT_COMMIT (a copy without its history), else from git."""
    if os.environ.get("GIT_COMMIT"):
        return os.environ["GIT_COMMIT"]
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
