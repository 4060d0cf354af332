"""A real Slurm on this machine: munged, slurmctld and two slurmd, which are two nodes of the same host.

It needs root, and Debian's packages slurm-wlm and munge. Elsewhere a test is skipped, with the reason; in CI (CI=true)
it fails. Its files, ports and key are its own, so that no other Slurm of this machine is disturbed.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch.start.alive import with_variable
from tests.started import MARK, REPO

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
LIMIT_S = 240
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=20
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Why Slurm cannot be started here; empty if it can."""
    absent = [name for name in PROGRAMS if not program(name)]
    if os.geteuid() != 0:
        return "a Slurm of two nodes on one machine needs root"
    return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge" if absent else ""


def program(name):
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    if why := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{why}: it must be there in CI, see .ci/run")
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Cluster:
    def __init__(self, folder):
        self.folder, self.mark = Path(folder), f"slurm-{os.getpid()}"
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        ports = dict(zip(("port", "port_1", "port_2"), free_ports(3), strict=True))
        conf = CONF.format(host=socket.gethostname(), folder=self.folder, **ports)
        (self.folder / "slurm.conf").write_text(conf)
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def env(self):
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), MARK: self.mark, "PATH": path}

    def start(self):
        place = self.folder
        files = [f"--{kind}-file={place}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self._daemon("munged", ["--foreground", "--force", f"--socket={place}/munge.socket", *files])
        self.until(lambda: (place / "munge.socket").exists())
        self._daemon("slurmctld", ["-D", "-c"])
        for name in ("n1", "n2"):
            self.boot(name)

    def boot(self, node):
        """Start the daemon of a node, and wait until jobs can run there."""
        self._daemon("slurmd", ["-D", "-N", node], node)
        self.until(lambda: self.state(node) == "IDLE")

    def power_off(self, node):
        """Kill everything that runs on a node at once, as when it loses its power."""
        daemon = self.daemons.pop(node)
        tasks = [one for one in self.processes() if environment(one).get("SLURMD_NODENAME") == node]
        stepds = [one for one in self.processes() if one.name() == "slurmstepd" and descends(tasks, one)]
        tree = [psutil.Process(daemon.pid), *stepds, *tasks]
        for action in ("suspend", "kill"):  # nobody notices the end of another one
            for one in tree:
                with suppress(psutil.Error):
                    getattr(one, action)()
        daemon.wait()

    def stop(self):
        for name in ("n1", "n2", "slurmctld", "munged"):
            if name in self.daemons:
                self.daemons[name].send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    self.daemons[name].wait(10)
        for one in self.processes():
            with suppress(psutil.Error):
                one.kill()

    def processes(self):
        """Everything that the cluster has started, jobs too."""
        return with_variable(MARK, self.mark)

    def run(self, *words, **more):
        done = subprocess.run(
            words, env=self.env | more.pop("env", {}), capture_output=True, text=True, timeout=60, check=False, **more
        )
        return done.returncode, done.stdout, done.stderr

    def state(self, node):
        return self.shown("node", node).get("State", "").partition("+")[0]

    def job(self, number):
        return self.shown("job", str(number))

    def shown(self, kind, name):
        """What `scontrol show` says, by key."""
        _, out, _ = self.run("scontrol", "show", kind, name, "--oneliner")
        return dict(pair.split("=", 1) for pair in out.split() if "=" in pair)

    def idle(self):
        """Whether no job is in the queue, and both nodes are free."""
        code, jobs, _ = self.run("squeue", "--noheader")  # of a busy controller it gets no answer
        return code == 0 and not jobs.strip() and {self.state(one) for one in ("n1", "n2")} == {"IDLE"}

    def of_jobs(self):
        """What runs as a part of a job."""
        return [one for one in self.processes() if "SLURM_JOB_ID" in environment(one)]

    def at_once(self, number, restarts=1):
        """Let a job that was put back into the queue start now. Often Slurm makes it wait for two minutes.

        Not in the same second: a node compares the ages of a job's credentials in whole seconds, so it takes a start
        within the second of the requeue for the start that was ended ("Job 1 already killed, do not launch batch job").
        """

        def again():
            found = self.job(number)
            waits, goes_on = found.get("Reason") == "BeginTime", found.get("JobState") in ("RUNNING", *ENDED)
            return found if found.get("Restarts") == str(restarts) and (waits or goes_on) else None

        if self.until(again)["JobState"] == "PENDING":
            time.sleep(2)
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def wait(self, number, *states):
        """Wait until the job is in one of these states, and return what is known of it."""

        def reached():
            found = self.job(number)
            state = found.get("JobState")
            assert state in states or state not in ENDED, f"job {number} is {state}: {found}"
            return found if state in states else None

        return self.until(reached)

    def until(self, happens, limit_s=LIMIT_S):
        deadline = time.monotonic() + limit_s
        while not (found := happens()):
            if time.monotonic() > deadline:
                raise AssertionError(f"it waits; the end of the daemons' logs:\n{self.logs()}")
            time.sleep(0.2)
        return found

    def logs(self):
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)

    def _daemon(self, name, words, key=None):
        with (self.folder / f"{key or name}.out.log").open("ab") as out:
            line = [program(name), *words]
            self.daemons[key or name] = subprocess.Popen(
                line, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )


def job_env():
    return {"STRATEGY_LAB_PYTHON": sys.executable, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def environment(process):
    with suppress(psutil.Error, OSError):
        return process.environ()
    return {}


def descends(tasks, stepd):
    """Whether one of the tasks was started by this process, which is no child of the daemon."""
    with suppress(psutil.Error):
        return bool({one.pid for one in tasks} & {one.pid for one in stepd.children(recursive=True)})
    return False


def free_ports(count):
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports
