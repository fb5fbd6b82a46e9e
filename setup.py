"""softxent: metadata. `kernels/` is the source root, as `src/` is elsewhere; the import package is `softxent`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "kernels/softxent/__init__.py").read_text())
assert VERSION is not None

setup(
    name="softxent",
    version=VERSION[1],
    description="Softmax and cross-entropy for PyTorch, fused, forward and backward, in Triton",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    package_dir={"": "kernels"},
    packages=find_packages("kernels"),
    package_data={"softxent": ["py.typed"]},
    install_requires=["torch>=2.11", 'triton>=3.6; platform_system == "Linux"', "numpy"],
    extras_require={
        # for the training script of the checkout
        "fmnist": ["tqdm", "matplotlib", "safetensors", "pillow", "tensorboard"],
        "test": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis"],
    },
)
