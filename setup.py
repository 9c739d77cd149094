"""Map the rooms at the top level to the import name `fulmen.*`."""

from pathlib import Path

from setuptools import setup

ROOMS = ["launch", "recipes", "trainer", "parallel", "models", "data", "kernels"]


def packages() -> dict[str, str]:
    """Every folder with an `__init__.py` below a room, as {dotted package name: folder}."""
    found = {}
    for room in ROOMS:
        for init in sorted(Path(room).rglob("__init__.py")):
            found["fulmen." + ".".join(init.parent.parts)] = str(init.parent)
    return found


setup(
    name="fulmen",
    version="0.1.0",
    description="Distributed pretraining of lightning-attention mixture-of-experts models",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=list(packages()),
    package_dir=packages(),
    package_data={"fulmen.recipes": ["**/*.yaml", "*.yaml"], "fulmen.launch": ["job.sh"]},
    install_requires=[
        "torch>=2.11",  # its CUDA builds bring Triton
        "numpy",
        "hydra-core>=1.3",
        "datasets",
        "tokenizers",
        "safetensors",
        "wandb>=0.31",
        "tensorboard",
        "rich",
        "matplotlib",
        "zstandard",
        "pillow",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "transformers",
            "types-PyYAML",
            "triton",
            "wandb-workspaces",
        ],
        "dashboard": ["wandb-workspaces==0.4.13"],
        "transformers": ["transformers>=5"],
    },
    entry_points={
        "console_scripts": [
            "fulmen-pretrain = fulmen.launch.pretrain:main",
            "fulmen-submit = fulmen.launch.submit:main",
            "fulmen-preflight = fulmen.launch.preflight:main",
            "fulmen-plan = fulmen.launch.plan:main",
            "fulmen-prepare-data = fulmen.launch.prepare_data:main",
            "fulmen-prepare-images = fulmen.launch.prepare_images:main",
            "fulmen-make-images = fulmen.launch.make_images:main",
            "fulmen-zero-shot = fulmen.launch.zero_shot:main",
            "fulmen-resize-tower = fulmen.launch.resize_tower:main",
            "fulmen-make-retrieval = fulmen.launch.make_retrieval:main",
            "fulmen-fit-scaling = fulmen.launch.fit_scaling:main",
            "fulmen-dashboard = fulmen.launch.dashboard:main",
            "fulmen-report = fulmen.launch.report:main",
            "fulmen-generate = fulmen.launch.generate:main",
            "fulmen-export-hf = fulmen.launch.export_hf:main",
            "fulmen-import-hf = fulmen.launch.import_hf:main",
        ]
    },
)
