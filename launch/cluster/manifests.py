"""What Kubernetes is told of a run, as objects that become YAML: a TrainJob, or a Job with its Service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.cluster.size import Size
from train.config.problems import EXIT_INPUT, EXIT_SAVED, EXIT_STOPPED

HOME = "/lab"  # the folder of the source tree in the image (launch/Dockerfile), where runs/ is made
PORT = 29500
MAIN = "train/main.py"
JOIN_S = 600  # pods start minutes after each other, where a machine has to load the image first
GRACE_S = 150  # between TERM and KILL: torchrun gives its ranks 30 s, and a step and a save come before
RETRIES = 6  # of pods that failed for another reason than being evicted
RUNTIME = "torch-distributed"  # the ClusterTrainingRuntime that Kubeflow Trainer brings
OF_RUNTIME = "node"  # the names of its replicated job and of its container
MANAGER = "strategy-lab/launch.kubernetes"
Object = dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """`overrides`: the words of train/main.py. `claim`: a PersistentVolumeClaim for runs/. `join_s`: as of launch.node;
    it only counts for a Job."""

    name: str
    size: Size
    gpus_per_node: int
    image: str
    overrides: Sequence[str]
    claim: str | None = None
    join_s: int = JOIN_S

    def objects(self, form: str) -> list[Object]:
        return [self.train_job()] if form == "trainjob" else [self.service(), self.job()]

    def train_job(self) -> Object:
        """Kubeflow Trainer sets torchrun's options through the environment: PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR
        and others."""
        trainer: Object = {
            "image": self.image,
            "command": ["torchrun"],
            "args": [MAIN, *self.overrides],
            "numNodes": self.size.nodes,
            "numProcPerNode": self.size.per_node,
            **({"resourcesPerNode": self._resources()} if self.gpus_per_node else {}),
        }
        pod: Object = {"terminationGracePeriodSeconds": GRACE_S, "volumes": self._volumes()}
        pod["containers"] = [{"name": OF_RUNTIME, "volumeMounts": self._mounts()}]
        jobs = [{"name": OF_RUNTIME, "template": {"spec": {"template": {"spec": pod}}}}]
        patch = {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}}}
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": self.name},
            "spec": {"runtimeRef": {"name": RUNTIME}, "trainer": trainer, "runtimePatches": [patch]},
        }

    def service(self) -> Object:
        """It gives each pod of the Job a name, NAME-0.NAME for the first, also before the pod is ready."""
        spec: Object = {"clusterIP": "None", "publishNotReadyAddresses": True}
        spec |= {"selector": {"batch.kubernetes.io/job-name": self.name}, "ports": [{"name": "torchrun", "port": PORT}]}
        return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": self.name}, "spec": spec}

    def job(self) -> Object:
        """A pod for each machine. One that is evicted, or that has saved because it was told to leave, starts again and
        meets the others, whose ranks have ended too; wrong input and a loss that is not finite end the Job."""
        codes = {"Ignore": [EXIT_SAVED], "FailJob": [EXIT_INPUT, EXIT_STOPPED]}
        evicted = {"type": "DisruptionTarget", "status": "True"}
        rules: list[Object] = [{"action": "Ignore", "onPodConditions": [evicted]}]
        rules += [
            {"action": action, "onExitCodes": {"operator": "In", "values": values}} for action, values in codes.items()
        ]
        container: Object = {
            "name": self.name,
            "image": self.image,
            "command": ["python"],
            "args": ["-m", "launch.node", *self.words(), *self.overrides],
            "volumeMounts": self._mounts(),
            **({"resources": self._resources()} if self.gpus_per_node else {}),
        }
        pod: Object = {"subdomain": self.name, "restartPolicy": "Never", "terminationGracePeriodSeconds": GRACE_S}
        pod |= {"containers": [container], "volumes": self._volumes()}
        spec: Object = {"completionMode": "Indexed", "completions": self.size.nodes, "parallelism": self.size.nodes}
        spec |= {"backoffLimit": RETRIES, "podFailurePolicy": {"rules": rules}, "template": {"spec": pod}}
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": self.name}, "spec": spec}

    def words(self) -> list[str]:
        """The options of launch.node. Kubernetes puts the number of the pod in the place of the variable."""
        where = ["node=$(JOB_COMPLETION_INDEX)", f"head={self.head}:{PORT}", f"join_s={self.join_s}"]
        return [f"nodes={self.size.nodes}", *where, f"nproc={self.size.nproc}"]

    @property
    def head(self) -> str:
        return f"{self.name}-0.{self.name}"

    def _resources(self) -> Object:
        return {"limits": {"nvidia.com/gpu": str(self.gpus_per_node)}}

    def _volumes(self) -> list[Object]:
        """Shared memory, of which containers have only 64 MiB by default, and the runs."""
        runs = [{"name": "runs", "persistentVolumeClaim": {"claimName": self.claim}}] if self.claim else []
        return [{"name": "shm", "emptyDir": {"medium": "Memory"}}, *runs]

    def _mounts(self) -> list[Object]:
        runs = [{"name": "runs", "mountPath": f"{HOME}/runs"}] if self.claim else []
        return [{"name": "shm", "mountPath": "/dev/shm"}, *runs]
