"""The packages of the wheel, which pyproject.toml cannot find by itself: all of sft/, and what is shipped beside it."""

from setuptools import find_packages, setup

SHIPPED = ("recipes", "chat_templates", "tiny_base", "model_configs")

setup(
    packages=[
        *find_packages(include=["sft", "sft.*"]),
        "sft.shipped_files",
        *(f"sft.shipped_files.{folder}" for folder in SHIPPED),
    ],
    package_dir={"sft": "sft", "sft.shipped_files": "."}
    | {f"sft.shipped_files.{folder}": folder for folder in SHIPPED},
)
