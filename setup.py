"""Adds one step to the build that pyproject.toml describes: the C kernels, where there is a compiler."""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from model.native.build import SOURCE_DIRECTORY, build


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        try:
            build(SOURCE_DIRECTORY if self.editable_mode else Path(self.build_lib, "model", "native"))
        except RuntimeError as error:
            self.warn(f"installing without native kernels, torch will do the work: {error}")


class PlatformWheel(bdist_wheel):
    """The library is for one kind of machine, but for any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel}, distclass=PlatformDistribution)
