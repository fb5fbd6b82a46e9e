"""softxent: metadata. `kernels/` is the source root, as `src/` is elsewhere; the import package is `softxent`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "kernels/softxent/__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

# Links to files of the checkout lead nowhere from an index's page: their words stay.
README = re.sub(r"\[([^\]]+)\]\((?!https?://|#)[^)]+\)", r"\1", (HERE / "README.md").read_text(encoding="utf-8"))

setup(
    name="softxent",
    version=VERSION[1],
    description="Softmax and cross-entropy for PyTorch, fused, forward and backward, in Triton",
    long_description=README,
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=["pytorch", "triton", "cross-entropy", "softmax", "loss", "kernels", "language models", "z-loss"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    package_dir={"": "kernels"},
    packages=find_packages("kernels"),
    package_data={"softxent": ["py.typed"]},
    # No Triton: torch brings the one of its GPU, triton-rocm or triton-xpu for some, and another of the same name would
    # be written over it.
    install_requires=["torch>=2.10"],
    extras_require={
        "triton": ['triton>=3.6; platform_system == "Linux"'],
        # for the training script and the benchmark suite of the checkout
        "fmnist": ["numpy", "tqdm", "matplotlib", "safetensors", "pillow", "tensorboard", "jinja2"],
        "bench": ["numpy", "scipy", "tabulate", "matplotlib", "pytest", "pytest-benchmark"],
    },
)
