"""The environment of a run: variables of other launches, a machine without a name, unusual paths."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.start.environment import local_environment
from launch.sweeping.grid import expand
from tests.hosts import not_here
from train.command import cli
from train.command.overrides import quoted
from train.command.validate import validate
from train.config.problems import BadInput
from train.config.world import World, environment_problem
from train.record.run_dir import make_run_dir

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
NO_NAME = "no-such-host.invalid"  # a name that has no address
TORCHRUN = WHOLE | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


def config_of(*overrides):
    return cli.parse(cli.parser("test", ""), [*overrides])[0]


# what is left in the environment -> what is said of it; None: nothing is wrong
@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({}, None),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, None),  # as a cluster's image sets for everything
        (WHOLE, None),  # one process a machine, as Kubernetes' PyTorchJob has it
        (TORCHRUN, None),
        (WHOLE | {"RANK": "1", "LOCAL_RANK": "1"}, None),  # as scripts for Slurm have it
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but no RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, "RANK=0, but no WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, but no RANK"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "but no MASTER_ADDR, MASTER_PORT"),
        (WHOLE | {"RANK": "two"}, "RANK=two, which is not a number"),
        (WHOLE | {"RANK": ""}, "RANK=, which is not a number"),
        (WHOLE | {"RANK": "-1"}, "RANK=-1, which is not a number"),
        (WHOLE | {"WORLD_SIZE": "0"}, "RANK=0, WORLD_SIZE=0, but ranks count"),
        (WHOLE | {"RANK": "2"}, "RANK=2, WORLD_SIZE=2, but ranks count"),
        (WHOLE | {"MASTER_PORT": "tcp"}, "MASTER_PORT=tcp, which is not a number"),
        (WHOLE | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000, which is not a port"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE must hold"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE must hold"),
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT=x, which is not a number"),
    ],
)
def test_half_an_environment_is_refused(env, says):
    problem = environment_problem(env)
    if says is None:
        assert problem is None
        return
    assert problem is not None and problem.exit_code == 3
    assert says in problem.message
    assert "unset " in problem.fix and "launch.local" in problem.fix


@pytest.mark.parametrize(("nodes", "shared"), [("1", True), ("2", False), ("1", False)])
def test_a_restart_on_one_machine_has_a_place_of_its_own_in_the_store(nodes, shared, monkeypatch):
    of_agent = {"TORCHELASTIC_RESTART_COUNT": "3", "TORCHELASTIC_USE_AGENT_STORE": str(shared)}
    for name, value in (TORCHRUN | of_agent | {"GROUP_WORLD_SIZE": nodes}).items():
        monkeypatch.setenv(name, value)
    world = World.from_env()
    assert world.restarts_done == 3
    assert (world.store, world.one_agent) == (("127.0.0.1", 29500), nodes == "1" and shared)


@pytest.mark.timeout(60)
def test_a_plain_start_in_half_an_environment_answers_once(tmp_path):
    command = [sys.executable, str(REPO / "train" / "main.py"), "strategy=single"]
    env = ENV | {"WORLD_SIZE": "4"}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=50)
    assert run.returncode == 3
    assert len(run.stderr.splitlines()) == 3 and "WORLD_SIZE=4, but no RANK" in run.stderr


def test_a_local_launch_sets_its_own_environment():
    left = {"PET_NNODES": "4", "WORLD_SIZE": "4", "RANK": "1", "TORCHELASTIC_RUN_ID": "x", "STRATEGY_LAB_AGENT": "7"}
    env, notes = local_environment(2, left | {"HOME": "/home/x", "RES_OPTIONS": "", "GLOO_SOCKET_IFNAME": "eth7"})
    assert notes == [
        "ignored, as a local launch sets its own values: PET_NNODES, RANK, TORCHELASTIC_RUN_ID, WORLD_SIZE"
    ]
    own = {"PET_LOG_DIR", "PET_SIGNALS_TO_HANDLE", "STRATEGY_LAB_LAUNCH"}
    assert env.keys() == {"HOME", "RES_OPTIONS", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"} | own
    assert (env["GLOO_SOCKET_IFNAME"], env["PET_LOG_DIR"]) == ("eth7", os.devnull)


@pytest.mark.parametrize("answers", [True, False])
def test_nobody_waits_long_for_the_name_of_this_machine(answers, monkeypatch):
    def getaddrinfo(*_):
        assert os.environ["RES_OPTIONS"] == "timeout:1 attempts:1"
        if not answers:
            raise OSError("no such name")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    env, notes = local_environment(1, {})
    assert "RES_OPTIONS" not in os.environ
    assert ("RES_OPTIONS" in env, len(notes)) == ((False, 0) if answers else (True, 1))


ODD = [
    "/a b/c.txt", "a=b", "a(1)/b", "f(1)", "x~", "café/日本", "007", "1e3", "true", "1_000", "[a]", "{a}", "a#b;c!d&e",
    "it's", '"', "a\\b", "back\\", "s3", "C:/x", "%(x)s", "$x", "a:b c", " a ", "-x", "a@b",
]  # fmt: skip


def test_a_path_is_taken_as_typed():
    grammar = OverridesParser.create()
    for path in ODD:
        assert grammar.parse_override(quoted(f"data.path={path}")).value() == path
        (point,) = expand([f"data.path={path}", "data=text"])
        assert point.overrides == (f"data.path={path}", "data=text")
    words = [f"data.path={ODD[2]}", f"++metrics.dir={ODD[6]}", f"runtime.device={ODD[13]}"]
    config = config_of("data=text", *words)
    assert (config.data.path, config.metrics.dir, config.runtime.device) == (ODD[2], ODD[6], ODD[13])


def test_what_has_a_meaning_keeps_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x y")
    assert config_of("data.path=~/a=b").data.path == "/home/x y/a=b"
    assert config_of("data.path=./~").data.path == "./~"
    assert config_of("data.path=null").data.path is None
    assert config_of("data.path='a,b'").data.path == "a,b"
    assert config_of("data.path=${oc.env:HOME}/a(1)").data.path == "/home/x y/a(1)"
    assert config_of("+data.path=a=b").data.path == "a=b"
    assert quoted("train.steps=1e3") == "train.steps=1e3", "no text"
    several = expand(["data.path=~/a=1,/b (2)"])
    assert [config_of(*point.overrides).data.path for point in several] == ["/home/x y/a=1", "/b (2)"]
    plain = expand(["data.path=a,b"])
    assert [point.label for point in plain] == ["data.path=a", "data.path=b"]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "data.path=a,b",
            "several values, but this is one run: use one value, or python -m launch.sweep; a value with commas",
        ),
        ("train.steps=a=b", "two pairs of quotes"),
        ("data.path=a\nb", r"a\\nb has a character that cannot be shown"),
        ("data.path=\x1b[31m", r"\\x1b\[31m has a character"),
        ("data.path=caf\udce9", r"caf\\udce9 has bytes that are not UTF-8"),
        (
            "optim.lr=${oc.env:NO_SUCH}",
            r"the environment has no NO_SUCH: set it, or give a default",
        ),
        ("strategy.name=${oc.env:HOME}", r"strategy.name=\$\{oc.env:HOME\} would name a run"),
    ],
)
def test_a_word_that_cannot_be_taken_says_how_to_write_it(word, says):
    with pytest.raises(BadInput, match=says):
        config_of(word)


def found(config):
    return [problem.message for problem in validate(config, 1)]


def test_an_address_is_no_path():
    config = config_of("strategy=single", "data=text", "data.path=x")
    for place in ("s3://bucket/x", "gs://b", "hdfs://h/x", "dbfs:/x", "file:///x", "https://h/x"):
        for key, group in (("metrics.dir", "metrics"), ("data.path", "data")):
            section, field = getattr(config, group), key.partition(".")[2]

            def at(path, group=group, section=section, field=field):
                return replace(config, **{group: replace(section, **{field: path})})

            assert found(at(place)) == [f"{key}={place} is an address, but only local files can be used"]
            assert found(at(f"./{place}")) == found(at("C:/x")) == []


def test_a_strategys_name_stays_in_the_folder():
    config = config_of("strategy=single")
    for name in ("../../x", "/x", "a/b", "..", "", ".hidden", "a b", "x" * 65, "-x", "x\n"):
        (message,) = found(replace(config, strategy=replace(config.strategy, name=name)))
        assert message == f"strategy.name={name} cannot begin the name of a run's folder"
    assert found(replace(config, strategy=replace(config.strategy, name="my_fsdp-2.1"))) == []


@pytest.mark.timeout(30)
def test_a_folder_of_runs_behind_a_broken_link_is_refused(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "not" / "mounted")
    config, tree, _ = cli.parse(cli.parser("test", ""), [f"metrics.dir={tmp_path / 'runs'}"])
    with pytest.raises(BadInput):
        make_run_dir(config, tree, {"tp": 1}, 1)


def nameless():
    """The words that start a command on a machine whose name has no address. Skips the test where none can be made."""
    said = []
    for words in (["unshare", "--uts"], ["unshare", "--user", "--map-root-user", "--uts"]):
        line = [*words, "bash", "-c", f'hostname {NO_NAME} && exec "$@"', "-"]
        try:
            done = subprocess.run([*line, "true"], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired) as error:
            said.append(str(error))
            continue
        if done.returncode == 0:
            return line
        said.append(f"{' '.join(words)}: {done.stderr.strip()}")
    return not_here(f"a machine without a name cannot be made ({'; '.join(said)})")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_in_odd_surroundings(tmp_path):
    """All at once: left-over variables, a closed pipe, unusual paths, a value from the environment, and no name."""
    (tmp_path / "geheim (é)").mkdir()
    (tmp_path / "geheim (é)" / "a=b.txt").write_text("some text, again and again. " * 200)
    (tmp_path / "temporary").mkdir()
    left = {"PET_NNODES": "3", "WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": NO_NAME}
    words = [
        "nproc=2", "strategy=dp", "data=text", "data.path=${oc.env:PLACE}/a=b.txt", "metrics.dir=~/runs (é)=1",
        "train.steps=3", "train.seq_len=32", "train.eval_batches=1", "model.num_layers=1", "runtime.device=cpu",
    ]  # fmt: skip
    command = " ".join(f"'{word}'" for word in words)
    line = f"{sys.executable} -m launch.local {command} | head -1; exit ${{PIPESTATUS[0]}}"
    env = ENV | left | {"PLACE": "geheim (é)", "HOME": str(tmp_path), "TMPDIR": str(tmp_path / "temporary")}
    run = subprocess.run(
        [*nameless(), "bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=150
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("torchrun --standalone --local_addr=127.0.0.1")
    assert f"the name of this machine, {NO_NAME}, has no address" in run.stderr
    assert "ignored, as a local launch sets its own values: MASTER_ADDR, PET_NNODES, RANK, WORLD_SIZE" in run.stderr
    assert "Traceback" not in run.stderr and "BrokenPipe" not in run.stderr
    (folder,) = (tmp_path / "runs (é)=1").iterdir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3
    for file in folder.rglob("*"):
        assert file.is_dir() or b"geheim" not in file.read_bytes(), f"{file} has what the environment holds"
    assert not list((tmp_path / "temporary").glob("torchelastic*"))
