"""Installs sparse_flax and pallas_kernels, for any JAX project to import."""

import pathlib

import setuptools

CORE = [
  # The exact versions that are tested stand in constraints.txt. The lower bounds of this list, of
  # DATA and of LAUNCH were installed together on 2026-11-29 (Python 3.12.1): `make test-newest`'s
  # tests pass with them, those in the simulator of GPUs apart, which were not tried.
  "jax>=0.11.2,<0.13",
  "flax>=0.12.10,<0.13",
  "optax>=0.2.8,<0.3",
  "orbax-checkpoint>=0.12.3,<0.13",
  "jaxtyping>=0.3.9",
  "numpy>=2.1",
]

DATA = [
  "array_record>=0.8.3; sys_platform == 'linux'",
  "etils[epath]>=1.13",
  "importlib_resources",  # tensorflow-datasets imports it without requiring it
  "pillow>=12",
  "scipy>=1.15",
  "tensorflow-datasets>=4.9.9,<5",
]

LAUNCH = [
  "absl-py>=2.3.1",
  "chex>=0.1.91",
  "matplotlib>=3.10",
  "ml_collections>=1.1,<2",
  "plotly>=7,<8",
  "safetensors>=0.6.1",
  "tensorboardX>=2.6.4",
]

setuptools.setup(
  name="sparse-flax",
  version="0.1.0",
  description="Sparse Transformers (Child, Gray, Radford, Sutskever 2019) in JAX and Flax",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.12",
  packages=setuptools.find_packages(include=["sparse_flax*", "pallas_kernels*"]),
  package_data={
    "sparse_flax.view.report": ["page.css", "page.html", "page.js"],
    "sparse_flax.data": ["samples/*"],
    "sparse_flax": ["py.typed"],
    "pallas_kernels": ["py.typed", "tuning.json"],
  },
  install_requires=CORE + DATA + LAUNCH,
  extras_require={
    "cuda13": ["jax[cuda13]"],
    "tpu": ["jax[tpu]", "gcsfs"],
    "prepare": ["tensorflow-cpu>=2.20"],
    "flac": ["soundfile>=0.13"],
    "test": [
      "beartype>=0.22.1",
      "hypothesis>=6.150",
      "ipykernel>=7",
      "nbclient>=0.10",
      "pyrefly>=1.5",
      "pytest>=9",
      "pytest-xdist>=3.8",
      "ruff>=0.14",
      "selenium>=4.40",
      "soundfile>=0.13",
    ],
  },
)
