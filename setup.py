# SPDX-License-Identifier: Apache-2.0
"""Package list for setuptools; everything else stands in pyproject.toml.

Two folders at the top of the repository are installed inside the package: ``kernels/`` as
``fairkv_sglang.kernels`` and ``patches/`` as ``fairkv_sglang.patches``. Declarative package
discovery cannot look into several mapped folders, so the list is made here.
"""

from setuptools import find_packages, setup

packages = find_packages(include=["fairkv_sglang", "fairkv_sglang.*"])
for folder in ("kernels", "patches"):
    packages.append(f"fairkv_sglang.{folder}")
    packages += [f"fairkv_sglang.{folder}.{name}" for name in find_packages(folder)]

setup(packages=packages)
