"""Print what runs the lab on Kubernetes: python -m launch.kubernetes nodes=2 gpus_per_node=8 strategy=3d > job.yaml

`kubectl apply -f job.yaml` then starts it. form=trainjob is a TrainJob of Kubeflow Trainer v2, form=job an indexed Job
with a headless Service, which need nothing but Kubernetes itself. The image is built by launch/Dockerfile. Runs are
kept if claim=NAME names a PersistentVolumeClaim. dry_run=true prints the torchrun lines of the pods, and no YAML.

Takes every override that train/main.py takes, and the options that --help shows. nproc is the number of processes of
all machines together; without it, there is one for each GPU.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import yaml

from launch.cluster.manifests import JOIN_S, MAIN, PORT, Manifest
from launch.cluster.size import popped_size
from launch.describe.memory import Ranks, named_device, shortage
from launch.describe.nodes import warnings
from launch.start.device import laid_out
from launch.start.nodes import Node, nodes_line
from train.command import cli
from train.command.launching import nodes
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.command.resources import path_of
from train.config.plan import Plan
from train.config.problems import BadInput
from train.config.world import World
from train.strategies.memory import unknown_needs


def main(argv: Sequence[str]) -> int:
    """Print the objects, and return the exit code."""
    with reported_once(World.single()):
        words = list(argv)
        dry_run, form = nodes.DRY_RUN.pop(words), nodes.FORM.pop(words)
        manifest = read(words)
        if dry_run:
            lines = of_pods(manifest, form)
        else:
            lines = [yaml.safe_dump_all(manifest.objects(form), sort_keys=False).rstrip()]
        print("\n".join(lines), flush=True)
    return 0


def read(words: list[str]) -> Manifest:
    """The run of a command line, checked as far as this is possible without its machines. Raises BadInput."""
    count, gpus, name = nodes.NODES.pop(words), nodes.GPUS_PER_NODE.pop(words), nodes.JOB_NAME.pop(words)
    image, claim = nodes.IMAGE.pop(words), nodes.CLAIM.pop(words)
    join_s = nodes.JOIN_S.pop(words) if any(word.startswith("join_s=") for word in words) else JOIN_S
    size = popped_size(words, count, max(gpus, 1))
    parser = cli.parser(nodes.KUBERNETES, __doc__ or "")
    config = cli.parse(parser, laid_out(words, size.nproc, kept=1)[0])[0]
    cli.check(config, size.nproc)
    plan, capacity = Plan(config, size.nproc), named_device(config)
    if capacity is not None and not unknown_needs(plan) and (problem := shortage(Ranks(plan), capacity)):
        raise BadInput(problem)
    print("".join(f"{line}\n" for line in warnings(plan, count)), end="", file=sys.stderr, flush=True)
    return Manifest(name, size, gpus, image, parser.parse_intermixed_args(words).overrides, claim, join_s)


def of_pods(manifest: Manifest, form: str) -> list[str]:
    """The torchrun line of each pod. Under Kubeflow Trainer its options come from the environment; in a Job launch.node
    adds the address of the pod."""
    size, main_file, address = manifest.size, path_of(MAIN), "ADDRESS" if form == "job" else ""
    pods = [Node(number, size.nodes, manifest.head, PORT, address) for number in range(size.nodes)]
    lines = [nodes_line(manifest.overrides, size.per_node, pod) for pod in pods]
    # in the image the working directory is the source tree
    return [shlex.join(["torchrun", *(MAIN if word == main_file else word for word in line)]) for line in lines]


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
