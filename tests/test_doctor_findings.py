"""The findings of `launch.doctor`, one by one: each is made to fail by values that are put in."""

import json
import os
import sys
import time
from dataclasses import replace

import pytest

from launch.examine import folders, machine, names, packages, variables
from launch.examine.child import Answers, Child
from launch.examine.finding import Level
from launch.start.environment import SHORT_LOOKUP

OK, WARNING, ERROR = Level.OK, Level.WARNING, Level.ERROR
NO_NAME = "no-such-host.invalid"


def check(findings, level, says):
    """The worst of the findings has this level, and its message says this. All but ok ones have a fix."""
    worst = max(findings, key=lambda one: [*Level].index(one.level))
    assert (worst.level, says in worst.message) == (level, True), findings
    assert all(bool(one.fix) == (one.level is not OK) for one in findings)
    json.dumps([dict(one.values) for one in findings], allow_nan=False)


NEEDS = packages.required()
RIGHT = packages.Installed(
    "3.12.1",
    {"torch": "2.13.0+cpu", "hydra-core": "1.3.8", "omegaconf": "2.3.1", "tensorboard": "2.21.0", "numpy": "2.4.6",
     "psutil": "7.2.2", "rich": "15.0.0", "setuptools": "84.2.1"},
    frozenset({"ninja", "compiler"}),
)  # fmt: skip


@pytest.mark.parametrize(
    ("versions", "level", "says"),
    [
        ({}, OK, "Python 3.12.1, torch 2.13.0+cpu, hydra-core 1.3.8"),
        ({"torch": "2.11.0a0+git5228986"}, OK, ""),  # a build of a version in the range
        ({"torch": "2.10.1"}, ERROR, "torch 2.10.1 is installed, but the lab needs torch<2.14,>=2.11: the lab calls"),
        ({"torch": "2.14.0.dev20261101"}, ERROR, "torch 2.14.0.dev20261101 is installed"),
        ({"torch": None}, ERROR, "torch is not installed, and every run needs it"),
        ({"torch": "unknown"}, ERROR, "torch unknown is installed"),
        ({"hydra-core": "1.3.7"}, ERROR, "older ones let a config run code"),
        ({"hydra-core": "1.4.0.dev1"}, ERROR, "hydra-core 1.4.0.dev1 is installed"),
        ({"omegaconf": "2.4.0.dev3"}, ERROR, "hydra-core 1.3 needs this range"),
        ({"numpy": "1.24.0"}, WARNING, "the lab was not tried with it"),
        ({"tensorboard": "2.20.0", "setuptools": "81.0.0"}, WARNING, "older versions need the module pkg_resources"),
        ({"deepspeed": "0.19.8"}, OK, ""),
        ({"deepspeed": "0.18.2"}, WARNING, "deepspeed 0.18.2 is installed"),
    ],
)
def test_versions(versions, level, says):
    held = {name: version for name, version in {**RIGHT.versions, **versions}.items() if version}
    found = packages.judge(NEEDS, replace(RIGHT, versions=held))
    check(found, level, says)
    assert level is OK or any("pip install" in one.fix for one in found)


def test_pairs_of_packages():
    old_board = {**RIGHT.versions, "tensorboard": "2.20.0", "setuptools": "82.0.0"}
    found = packages.judge(NEEDS, replace(RIGHT, versions=old_board))
    assert any("which setuptools 82.0.0 no longer has: it does not start" in one.message for one in found)
    check(packages.judge(NEEDS, replace(RIGHT, programs=frozenset())), WARNING, "no C++ compiler is found")
    speed = replace(RIGHT, versions={**RIGHT.versions, "deepspeed": "0.19.8"}, programs=frozenset({"compiler"}))
    check(packages.judge(NEEDS, speed), WARNING, "deepspeed is installed, but no ninja")
    check(packages.judge(NEEDS, replace(RIGHT, python="3.10.2")), ERROR, "this is Python 3.10.2, but the lab needs")


def test_what_is_installed_here_is_read():
    here = packages.installed(NEEDS, {"PATH": "", "CXX": sys.executable})
    assert here.versions["torch"] and here.versions["hydra-core"] and here.programs == {"compiler"}


@pytest.mark.parametrize(
    ("env", "level", "says"),
    [
        ({"HOME": "/x", "NCCL_DEBUG": "warn", "GLOO_SOCKET_IFNAME": "", "CUDA_LAUNCH_BLOCKING": "0"}, OK, "is left"),
        ({"WORLD_SIZE": "4"}, ERROR, "WORLD_SIZE=4, but no RANK, MASTER_ADDR, MASTER_PORT: launch.local ignores this"),
        ({"PET_NNODES": "3", "MASTER_ADDR": "node1"}, WARNING, "MASTER_ADDR=node1, PET_NNODES=3; launch.local ignores"),
        ({"GLOO_SOCKET_IFNAME": "eth7"}, ERROR, "GLOO_SOCKET_IFNAME=eth7, but this machine has no interface eth7"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, WARNING, "leaves none of the interfaces lo, eth0"),
        ({"NCCL_SOCKET_IFNAME": "^lo,eth"}, WARNING, "leaves none of the interfaces lo, eth0"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, WARNING, "leaves none of the interfaces lo, eth0"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, WARNING, "set, and taken by every run: NCCL_SOCKET_IFNAME=eth"),
        ({"NCCL_P2P_DISABLE": "1"}, WARNING, "NCCL_P2P_DISABLE=1 sends between GPUs through the memory of the host"),
        ({"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, WARNING, "compares the shapes of all ranks"),
        ({"HYDRA_FULL_ERROR": "1", "NCCL_ALGO": "x" * 99}, WARNING, f"HYDRA_FULL_ERROR=1, NCCL_ALGO={'x' * 40}…"),
    ],
)  # fmt: skip
def test_variables(env, level, says):
    found = sorted(variables.judge(env, ["lo", "eth0"]), key=lambda one: says in one.message)
    check(found[-1:], level, says)


def test_each_variable_is_named_once():
    env = {"RANK": "0", "PET_X": "1", "NCCL_DEBUG": "INFO", "NCCL_ALGO": "Ring", "GLOO_SOCKET_IFNAME": "eth7"}
    told = [name for one in variables.judge(env, ["lo"]) for name in one.values["variables"]]
    assert sorted(told) == sorted(env)


GiB = 2**30
LARGE = machine.Machine(16, 16, 64 * GiB, 60 * GiB, (65536, 65536))


@pytest.mark.parametrize(
    ("changes", "nproc", "omp", "level", "says"),
    [
        ({}, 4, None, OK, "16 cores"),
        ({}, 32, "1", WARNING, "16 cores, but nproc=32 processes would share them"),
        ({}, 4, "5", WARNING, "5 thread(s) in each of 4 process(es), by OMP_NUM_THREADS=5: more than 16 core(s)"),
        ({}, 1, "all", WARNING, "OMP_NUM_THREADS=all is not a number of threads"),
        ({}, 1, "0", WARNING, "OMP_NUM_THREADS=0 is not a number of threads"),
        ({"usable": 1.5}, 1, None, WARNING, "by launch.local's own choice: more than 1.5 core(s)"),
        ({"available": GiB}, 4, "1", WARNING, "1.0 of 64.0 GiB are free, but nproc=4 processes"),
        ({"files": (256, 4096)}, 1, "1", WARNING, "256 in each process"),
        ({"files": (256, 256)}, 1, "1", WARNING, "256 in each process"),
    ],
)
def test_cores_memory_and_files(changes, nproc, omp, level, says, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    check(machine.judge(replace(LARGE, **changes), nproc, {"OMP_NUM_THREADS": omp} if omp else {}), level, says)


def test_the_fix_of_too_many_threads_is_right(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    machines = (LARGE, replace(LARGE, usable=4))
    fixes = [machine.judge(one, 2, {"OMP_NUM_THREADS": "9"})[1].fix for one in machines]
    assert fixes == ["unset OMP_NUM_THREADS", "export OMP_NUM_THREADS=2"]


def test_the_limits_of_a_container(tmp_path):
    assert machine.cpu_quota(tmp_path) == machine.memory_left(tmp_path) == float("inf")
    texts = {"cpu.max": "150000 100000\n", "memory.max": "1000\n", "memory.current": "700\n"}
    for name, text in {**texts, "memory.stat": "anon 500\ninactive_file 150\n"}.items():
        (tmp_path / name).write_text(text)
    assert (machine.cpu_quota(tmp_path), machine.memory_left(tmp_path)) == (1.5, 450)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cpu_quota(tmp_path) == machine.memory_left(tmp_path) == float("inf")


def test_this_machine_is_measured():
    here = machine.here()
    assert 0 < here.usable <= here.cores and 0 < here.available <= here.total


GOOD_DISK = {"place": "/x", "type": "ext4", "total_gib": 100.0, "free_gib": 50.0, "files_left": None, "fsync_ms": 1.0,
             "write_mib_per_s": 99.0, "locks": True}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "level", "says"),
    [
        ("run directory", {}, OK, "metrics.dir=x (ext4): 50.0 of 100.0 GiB are free, an fsync takes 1.0 ms, 99 MiB/s"),
        ("run directory", {"refused": "Read-only file system"}, ERROR, "=x cannot be written (Read-only file system)"),
        ("run directory", {"refused": "No space left on device"}, ERROR, "(No space left on device)"),
        ("run directory", {"free_gib": 0.001}, ERROR, "the disk of metrics.dir=x is full: 1 MiB are free"),
        ("run directory", {"files_left": 0}, ERROR, "no more files can be made"),
        ("run directory", {"free_gib": 0.5}, WARNING, "room for small checkpoints only"),
        ("run directory", {"type": "tmpfs"}, WARNING, "it is in memory"),
        ("run directory", {"fsync_ms": 400.0}, WARNING, "waits for an fsync"),
        ("run directory", {"locks": False}, WARNING, "it has no locks"),
        ("temporary files", {}, OK, "/x: 50.0 GiB are free"),
        ("temporary files", {"refused": "Permission denied"}, ERROR, "x cannot be written (Permission denied)"),
        ("temporary files", {"free_gib": 0.001}, WARNING, "compilation and the proof keep files there"),
        ("/dev/shm", {"type": "tmpfs"}, OK, "50.00 of 100.00 GiB are free"),
        ("/dev/shm", {"free_gib": 0.0625}, WARNING, "0.06 of 100.00 GiB are free: NCCL needs it"),
        ("/dev/shm", {"refused": "Permission denied"}, WARNING, "it cannot be written (Permission denied)"),
    ],
)
def test_disks(name, changes, level, says):
    check(folders.judge(Answers({name: GOOD_DISK | changes}), {name: "x"}), level, says)


def test_a_disk_that_does_not_answer_is_an_error():
    asked = dict.fromkeys(("run directory", "/dev/shm"), "x")
    (found,) = folders.judge(Answers(end="it did not answer within 9 s"), asked)
    check([found], ERROR, "x could not be tried: it did not answer within 9 s")


def test_folders_are_tried_and_left_as_they_were(tmp_path):
    (tmp_path / "file").touch()
    tried = folders.try_folder(str(tmp_path / "new" / "runs"))
    assert tried["place"] == str(tmp_path) and tried["fsync_ms"] > 0 and tried["write_mib_per_s"] > 0
    assert folders.try_folder(str(tmp_path / "file" / "runs")) == {"refused": "Not a directory"}
    assert folders.try_folder(str(tmp_path / ("a" * 300))) == {"refused": "File name too long"}
    assert folders.try_folder("/proc/x")["refused"] == "No such file or directory"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_the_type_of_a_file_system_is_that_of_the_mount_that_is_seen(tmp_path):
    mounts = [("/", "ext4"), (str(tmp_path), "nfs4"), (f"{tmp_path}2", "xfs"), (str(tmp_path), "tmpfs")]
    assert folders.type_of(tmp_path / "runs", mounts) == "tmpfs"
    assert folders.type_of(tmp_path.parent, mounts) == "ext4" and folders.type_of(tmp_path, []) == ""


@pytest.mark.timeout(30)
def test_a_name_without_an_address_is_a_warning():
    child = Child("launch.examine.names", ["localhost", NO_NAME], {**os.environ, **SHORT_LOOKUP})
    answers = child.answers(time.monotonic() + 20)
    check(names.judge(answers, "localhost", {}), OK, "localhost has the address ")
    check(names.judge(answers, NO_NAME, {}), WARNING, f"{NO_NAME}, this machine's name, has no address (")
    check(names.judge(answers, "localhost", {"MASTER_ADDR": NO_NAME}), WARNING, f"MASTER_ADDR={NO_NAME} has no address")
    check(names.judge(Answers(end="it did not answer within 9 s"), "x", {}), WARNING, "(it did not answer within 9 s)")


def test_connections():
    check(names.connection(), OK, "can connect to 127.0.0.1")
    check(names.connection("192.0.2.1"), ERROR, "cannot connect to 192.0.2.1 (")  # an address that nobody has
