"""The packages of the wheel, which pyproject.toml cannot find by itself: all of sft/, and what is shipped with it."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "chat_templates", "tiny_base", "tiny_smolvlm", "model_configs")


class WithoutSetup(build_py):
    """Leaves this file out: `sft.shipped_files` is the top of the repository, of which only data files are shipped."""

    def find_package_modules(self, package, package_dir):
        """Return the modules of a package."""
        return [] if package == "sft.shipped_files" else super().find_package_modules(package, package_dir)


setup(
    cmdclass={"build_py": WithoutSetup},
    packages=[
        *find_packages(include=["sft", "sft.*"]),
        "sft.shipped_files",
        *(f"sft.shipped_files.{folder}" for folder in SHIPPED),
    ],
    package_dir={"sft": "sft", "sft.shipped_files": "."}
    | {f"sft.shipped_files.{folder}": folder for folder in SHIPPED},
)
