"""The dependencies of the package. pyproject.toml describes it; constraints.txt has the tested versions."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["megatron_dms", "megatron_dms.*"]),
    install_requires=[
        # The wheel holds megatron.training too, but on Python >= 3.12 only. A few places use private names of
        # megatron-core (each place names the version it was checked on), hence the upper bound.
        "megatron-core[training]>=0.19.2,<0.20",
        "torch>=2.6",
        "numpy",
        # Exported models depend on more of transformers than is documented; 5.24 gave the cache another name.
        # Their tests pass on 4.57, 5.23 and 5.24, and a later release is to be tried first, hence the bound.
        "transformers>=4.57,<5.25",
        "nvidia-modelopt>=0.47",
        "safetensors",
        "wandb",
        "tensorboard",
        "matplotlib",
    ],
    # NVIDIA's Apex is used if it can be imported. It is not a dependency: the package that the index calls
    # "apex" is another project.
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "eval": ["math-verify", "lm-eval", "datasets"],
        "dev": ["pytest", "pytest-xdist", "mypy", "ruff", "hypothesis", "check-jsonschema", "zizmor"],
        "docs": ["mkdocs-material"],
    },
)
