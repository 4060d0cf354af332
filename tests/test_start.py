"""Which run goes on when torchrun has started the ranks again, or when a line is typed again."""

import errno
import fcntl
import os
from dataclasses import replace

import pytest

from train.checkpoint.resume import find
from train.command import cli
from train.command.process.life import FINISHED, SAVED, STOPPED, Living, alone_in, is_alive
from train.config.problems import BadInput
from train.config.world import World, kept_environment
from train.ranks.side_group import SideGroup

NAME = "single-ws1-abcdef"
RESTARTED = replace(World.single(), restarts_done=1, launch="mine")


def run(root, name, launch, *, state="", saved=()):
    path = root / name
    for step in saved:
        (path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    path.mkdir(exist_ok=True)
    living = Living(path, 0, launch)
    if state:
        living.end(state, "train/loss=nan")
    else:
        living.end(SAVED)
    return path


def start(root, world, resume="auto"):
    config = cli.configured([f"metrics.dir={root}", f"checkpoint.resume={resume}"])
    return find(config, NAME, dict, {}, SideGroup(world))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_restart_goes_on_with_its_own_run(resume, tmp_path):
    mine = run(tmp_path, NAME, "mine")
    run(tmp_path, f"{NAME}-2", "another line", saved=[8])
    found = start(tmp_path, RESTARTED, resume)
    assert found.run == mine and found.step == 0 and found.said == (f"{mine} begins again, as it has no checkpoint",)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_restart_of_an_ended_run_ends(resume, tmp_path):
    run(tmp_path, NAME, "mine", state=STOPPED, saved=[4])
    with pytest.raises(BadInput, match="was stopped: train/loss=nan: a restart has nothing to do"):
        start(tmp_path, RESTARTED, resume)
    (tmp_path / NAME / "summary.json").touch()
    with pytest.raises(SystemExit) as finished:
        start(tmp_path, RESTARTED, resume)
    assert finished.value.code == 0


def test_a_restart_before_its_run_was_made_starts_one(tmp_path):
    run(tmp_path, NAME, "another line", saved=[4])
    assert start(tmp_path, RESTARTED, "never").run is None


def test_a_line_that_is_typed_again_leaves_ended_runs(tmp_path):
    run(tmp_path, NAME, "another line", state=STOPPED, saved=[4])
    assert start(tmp_path, World.single()).run is None
    run(tmp_path, f"{NAME}-2", "another line", state=FINISHED)
    (tmp_path / f"{NAME}-2" / "summary.json").touch()
    assert start(tmp_path, World.single()).run is None


def test_a_run_without_a_good_checkpoint_is_not_begun_again_silently(tmp_path):
    mine = run(tmp_path, NAME, "another line", saved=[2, 4])
    with pytest.raises(BadInput) as refused:
        start(tmp_path, World.single())
    why = "is not used: manifest.json cannot be read (No such file or directory)"
    bad = "; ".join(f"{mine / 'checkpoints' / f'step-{step}'} {why}" for step in (4, 2))
    assert str(refused.value) == f"{mine} has no good checkpoint: {bad}: use checkpoint.resume=never to start a new run"


def test_where_locks_do_not_work_only_a_start_of_the_same_launch_follows_at_once(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    Living(tmp_path, 3, "mine").close()
    with pytest.raises(BadInput, match="is being trained by process"):
        Living(tmp_path, 0, "another line")
    Living(tmp_path, 3, "mine").close()


def test_a_keeper_gives_its_rank_the_launch_of_its_own_start(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}
    keeper = World.from_env()
    assert keeper.launch == f"none/{os.getppid()}"
    os.environ |= kept_environment(keeper, "")
    rank = World.from_env()
    assert rank.launch == keeper.launch and rank.agent == os.getpid()


def test_a_lock_has_one_holder_and_leaves_no_file(tmp_path):
    living = Living(tmp_path, 1)
    assert is_alive(tmp_path) and is_alive(tmp_path), "looking does not disturb"
    with pytest.raises(BadInput, match="is being trained by process"):
        Living(tmp_path, 1)
    living.end(FINISHED)
    assert not is_alive(tmp_path)
    with alone_in(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["life.json"]
