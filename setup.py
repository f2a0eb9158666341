"""Package layout. Everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["fluxkernels", "fluxkernels.reference", "fluxkernels.ops", "fluxmatching"],
    package_dir={"fluxkernels": "fluxkernels", "fluxmatching": "python_api/fluxmatching"},
    package_data={"fluxkernels": ["py.typed", "MATH.md"], "fluxmatching": ["py.typed"]},
)
