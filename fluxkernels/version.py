"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fluxkernels")
except PackageNotFoundError:  # run from a checkout, as `make gpu` does
    __version__ = "not-installed"
