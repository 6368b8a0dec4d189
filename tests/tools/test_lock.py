"""What the software bill of materials describes, the installed packages, is what the lock names."""

import sysconfig
from collections.abc import Mapping
from importlib.metadata import distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / ("constraints.txt" if version("transformers").startswith("4.") else "constraints-latest.txt")
# The project and what installs it.
OUTSIDE = ("exporter", "pip", "setuptools", "wheel")


def differences(lock: str, installed: Mapping[str, str]) -> list[str]:
    """Installed packages that the lock does not name, or names in another version."""
    lines = [line for line in lock.splitlines() if line and not line.startswith("#")]
    locked = {canonicalize_name(one.name): one.specifier for one in map(Requirement, lines)}
    found = []
    for name, installed_version in installed.items():
        own = canonicalize_name(name)
        if own not in locked and own not in OUTSIDE:
            found.append(f"{name} {installed_version} is not locked")
        elif own in locked and not locked[own].contains(installed_version, prereleases=True):
            found.append(f"{name} {installed_version} is locked{locked[own]}")
    return found


def test_every_installed_package_is_as_locked() -> None:
    # Not sys.path: setuptools, once imported, adds packages of its own to it.
    installed = {one.metadata["Name"]: one.version for one in distributions(path=[sysconfig.get_path("purelib")])}
    assert len(installed) > 50
    assert not differences(LOCK.read_text(), installed)


def test_every_line_of_the_lock_names_one_version() -> None:
    for lock in ("constraints.txt", "constraints-latest.txt"):
        lines = [line for line in (ROOT / lock).read_text().splitlines() if line and not line.startswith("#")]
        pins = [list(Requirement(line).specifier) for line in lines]
        assert all(len(one) == 1 and one[0].operator == "==" and "*" not in one[0].version for one in pins)


def test_another_version_and_another_package_are_seen() -> None:
    lock = "# torch\ntorch==2.0.0\nhuggingface_hub==1.0\nPyYAML==6.0\n"
    assert differences(lock, {"torch": "2.0.0+cpu", "huggingface-hub": "1.0", "pyyaml": "6.0", "exporter": "0"}) == []
    wrong = differences(lock, {"torch": "2.0.1", "evil": "1"})
    assert wrong == ["torch 2.0.1 is locked==2.0.0", "evil 1 is not locked"]
