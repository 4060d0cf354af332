"""Emulated hosts for tests: network namespaces, where this machine allows them. In CI (CI=true) they must be."""

import os
from typing import NoReturn

import pytest

from launch.emulating.cluster import Cluster
from launch.emulating.namespaces import has_netem, network, rights
from launch.emulating.record import recorded
from train.config.problems import BadInput


def allowed():
    """How namespaces are made here. Skips the test where they are not allowed."""
    try:
        return rights()
    except BadInput as why:
        not_here(str(why))


def needs_netem():
    if not has_netem(allowed()):
        not_here("this kernel has no netem, which delays and loses packets", also_in_ci=True)


def not_here(why, *, also_in_ci=False) -> NoReturn:
    """Skip the test, with the reason; in CI it fails, unless the reason counts there too."""
    if os.environ.get("CI") == "true" and not also_in_ci:
        pytest.fail(f"namespaces must be allowed in CI: {why}")
    pytest.skip(why)


@pytest.fixture
def two_hosts():
    """Two hosts with an unshaped link, and the record of their run."""
    found = allowed()
    with recorded() as record, network(Cluster(2, 2), found, record) as net:
        yield net, record
