"""Install pip into the environment that runs this, from its wheel on PyPI, for a Python that lacks ensurepip."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
ADVICE = "Install it for your Python (Debian, Ubuntu: apt-get install python3-venv), or give another: make PYTHON=..."


def main() -> None:
    # The HTML of PEP 503, which every index serves; not all serve JSON.
    request = urllib.request.Request(INDEX, headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=30) as response:
        page = response.read().decode()
    wheels = re.findall(r'href="([^"#]*/(pip-([0-9.]+)-py3-none-any\.whl))#sha256=([0-9a-f]{64})"', page)
    if not wheels:
        raise OSError("it lists no wheel of pip")
    url, name, _, sha256 = max(wheels, key=lambda wheel: [int(part) for part in wheel[2].split(".")])
    with urllib.request.urlopen(urljoin(INDEX, url), timeout=30) as response:
        content = response.read()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{name} does not have the SHA-256 that the index gives")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        # A wheel is a zip file, and pip runs from its own.
        subprocess.run([sys.executable, f"{path}/pip", "install", "-q", "--no-index", str(path)], check=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"this Python has no ensurepip, and pip could not be had from {INDEX}: {error}\n{ADVICE}")
