"""Package metadata. Tool settings stand in pyproject.toml, the exact tested versions in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="megatron-dms",
    version="0.1.0",
    description="Retrofit a pretrained LLM with a KV cache that forgets (DMS), inside Megatron",
    author="The megatron_dms authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_dms", "megatron_dms.*"]),
    python_requires=">=3.12",
    install_requires=[
        # The wheel holds megatron.training too, but on Python >= 3.12 only. Private names of it are used in a
        # few places (each names the version it was checked on), hence the upper bound.
        "megatron-core[training]>=0.19.2,<0.20",
        "torch>=2.6",
        "numpy",
        "transformers>=4.57",
        "nvidia-modelopt>=0.47",
        "safetensors",
        "wandb",
        "tensorboard",
        "matplotlib",
    ],
    # NVIDIA's Apex is used where it can be imported and is named nowhere here: what the package index calls
    # "apex" is another project.
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "eval": ["math-verify", "lm-eval", "datasets"],
        "dev": ["pytest", "pytest-xdist", "mypy", "ruff", "hypothesis", "check-jsonschema", "zizmor"],
        "docs": ["mkdocs-material"],
    },
)
