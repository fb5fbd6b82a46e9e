"""Install pip into the environment that runs this, from its wheel on PyPI, for a Python that lacks ensurepip."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
ADVICE = "Install it for your Python (Debian, Ubuntu: apt-get install python3-venv), or give another: make PYTHON=..."


def main() -> None:
    request = urllib.request.Request(INDEX, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        files = json.load(response)["files"]
    wheels = [file for file in files if file["filename"].endswith("-py3-none-any.whl") and not file.get("yanked")]
    wheel = max(wheels, key=lambda file: _release(file["filename"]))
    with urllib.request.urlopen(urljoin(INDEX, wheel["url"]), timeout=30) as response:
        content = response.read()
    if hashlib.sha256(content).hexdigest() != wheel["hashes"]["sha256"]:
        raise OSError(f"{wheel['filename']} does not have the SHA-256 that the index gives")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / wheel["filename"]
        path.write_bytes(content)
        # A wheel is a zip file, and pip runs from its own.
        subprocess.run([sys.executable, f"{path}/pip", "install", "-q", "--no-index", str(path)], check=True)


def _release(filename: str) -> tuple[int, ...]:
    """The version in pip-24.0-py3-none-any.whl as numbers; a pre-release comes before everything."""
    parts = filename.split("-")[1].split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else (0,)


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"this Python has no ensurepip, and pip could not be had from {INDEX}: {error}\n{ADVICE}")
