"""Which versions of the stack this package was tested with."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from flexolmo_megatron.errors import FlexOlmoError

TESTED = {"megatron-core": SpecifierSet(">=0.16.1,<0.17"), "torch": SpecifierSet(">=2.6")}


@cache
def check_versions() -> None:
    """Check the packages that every Megatron-side command needs.

    Raises:
        FlexOlmoError: one is missing or of a version that was not tested; the message has the install command.
    """
    for package, tested in TESTED.items():
        command = f"pip install '{package}{tested}'"
        try:
            found = version(package)
        except PackageNotFoundError:
            raise FlexOlmoError(f"{package} is not installed; run: {command}") from None
        if not tested.contains(found, prereleases=True):
            raise FlexOlmoError(f"{package} {found} is installed, tested is {tested}; run: {command}")
