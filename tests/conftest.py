"""Test set-up: one thread per process, as in ranks. At the end it prints how many of the planted bugs were found and,
with `--clock`, how long the tests took."""

import pytest
import torch

torch.set_num_threads(1)
pytest_plugins = ["tests.saved_runs", "tests.faults", "tests.slurm_cluster"]  # fixtures of several files


def pytest_addoption(parser):
    parser.addoption("--clock", action="store_true", help="measure the machine and the tests (tests/clock.py)")


def pytest_configure(config):
    if config.option.clock and not hasattr(config, "workerinput"):  # a worker of pytest-xdist is one of two
        from tests.clock import Clock

        config.pluginmanager.register(Clock())


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter):
    """List the `record_property("planted_bug", …)` of the test of each bug, and whether the test passed."""
    lines = [
        (report.outcome == "passed", text)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, text in report.user_properties
        if name == "planted_bug" and report.when == "call"
    ]
    if lines:
        terminalreporter.section("planted bugs")
        for seen, text in sorted(lines, key=lambda line: line[1]):
            terminalreporter.line(("red, as it must be  " if seen else "NOT SEEN            ") + text)
        terminalreporter.line(f"score: {sum(seen for seen, _ in lines)}/{len(lines)}")
