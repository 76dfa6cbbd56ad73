"""What pyproject.toml allows is what was tried: its lower bounds are the releases of `make test-oldest`."""

import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = ("ruff", "nextscale", "torchvision")  # a linter, our own extras, and what follows torch


def releases(lines):
    """Name -> release of every line that says one."""
    read = map(Requirement, lines)
    return {each.name: Version(next(iter(each.specifier)).version) for each in read if each.name not in NOT_RUN}


def test_every_lower_bound_is_an_oldest_release():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = chain(project["dependencies"], *project["optional-dependencies"].values())
    pinned = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    assert releases(asked) == releases(line for line in pinned if not line.startswith("#"))
