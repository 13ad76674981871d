"""Packaging of flexolmo_megatron. Version ranges are those that were tested together."""

from setuptools import find_packages, setup

setup(
    name="flexolmo-megatron",
    version="0.1.0",
    description="FlexOlmo (arXiv 2507.07024) as a plugin for Megatron-core",
    license="Apache-2.0",
    packages=find_packages(include=["flexolmo_megatron", "flexolmo_megatron.*"]),
    package_data={
        "flexolmo_megatron.config": ["presets/*.yaml"],
        "flexolmo_megatron.evaluation.suites": ["*.yaml"],
        "flexolmo_megatron.launch": ["templates/*"],
        "flexolmo_megatron.mix": ["recipes/*.yaml"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.17",
        "numpy>=1.26",
        "safetensors>=0.5",
        "omegaconf>=2.3,<2.4",
        "packaging",
        "psutil>=5.9",  # dist_checkpointing hangs on save without it
        "pyarrow>=15",
        "scikit-learn>=1.5,<2",  # these two for flexolmo proxy
        "datasketch>=2,<3",
        "rapidfuzz>=3.9,<4",  # flexolmo audit
        "tqdm>=4.66",
        "rich>=13",
        "matplotlib>=3.8",
        "tensorboard>=2.16",
    ],
    extras_require={
        "hf": ["transformers>=4.57,<6"],
        # Not in install_requires: it wants huggingface-hub 1.6, and the extras nemo and bridge one below 1.
        "datatrove": [
            "datatrove>=0.10.1,<0.11", "spacy>=3.8,<3.9", "tldextract>=5.3,<6", "pyahocorasick>=2.1,<3",
            "fasteners>=0.19,<1", "fasttext-numpy2-wheel>=0.9.2,<0.10",
        ],
        "embed": ["sentence-transformers>=3", "transformers>=4.57,<6"],
        "tasks": ["lm-eval>=0.4.13,<0.4.14"],
        "te": ["transformer-engine[pytorch]>=2.10,<2.12"],
        "nemo": ["nemo_toolkit==2.7.3", "transformers~=4.57.0"],  # as requirements-nemo.txt says, not by pip's resolver
        "bridge": ["megatron-bridge==0.3.1", "transformers~=4.57.0"],
        "dev": ["transformers>=4.57,<6", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.8", "ruff>=0.17,<0.18",
                "zstandard>=0.23"],
    },
    entry_points={
        "console_scripts": ["flexolmo=flexolmo_megatron.cli:main"],
        "nemo_run.cli": ["flexolmo=flexolmo_megatron.integrations.nemo"],
    },
)
