"""What launch.kubernetes prints, against the published models: TrainJob by kubeflow-trainer-api, Job and Service by the
kubernetes client. These models drop fields that they do not know, so what they give back must be equal.
"""

import copy
import re
import shlex
import sys
from dataclasses import replace

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from kubernetes.client import ApiClient, V1Job, V1Service

from launch import kubernetes as launcher
from launch import node
from tests.started import REPO
from train.config.problems import EXIT_INPUT, EXIT_SAVED, EXIT_STOPPED

LINE = "nodes=2 gpus_per_node=8 claim=runs strategy=3d train.global_batch_size=32"
WORDS = "strategy=3d train.global_batch_size=32"
FREE = ("selector", "limits")  # maps whose keys are not fields, in the objects below


def printed(capsys, line):
    assert launcher.main(shlex.split(line)) == 0
    return capsys.readouterr().out


def objects(capsys, line):
    return {one["kind"]: one for one in yaml.safe_load_all(printed(capsys, line))}


def understood(values):
    """What the model of an object keeps of it. It raises an error if a field is missing or has a wrong type."""
    if values.get("kind") == "TrainJob":
        return TrainerV1alpha1TrainJob.from_dict(values).to_dict()
    model = {"Job": V1Job, "Service": V1Service}[values["kind"]]
    return ApiClient().sanitize_for_serialization(model.from_dict(values))


def fields(values, path=()):
    """The path of every field, without those of maps with free keys."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        if isinstance(values, dict):
            yield (*path, key)
        if key not in FREE:
            yield from fields(value, (*path, key))


def misspelt(values, path):
    changed = copy.deepcopy(values)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[f"{path[-1]}s"] = place.pop(path[-1])
    return changed


@pytest.mark.parametrize("form", ["trainjob", "job"])
def test_every_field_is_known_and_a_misspelt_one_is_noticed(form, capsys):
    found = objects(capsys, f"{LINE} form={form}")
    assert [*found] == (["TrainJob"] if form == "trainjob" else ["Service", "Job"])
    for kind, values in found.items():
        assert understood(values) == values
        for path in fields(values):
            if path == ("kind",):
                continue
            try:
                kept = understood(misspelt(values, path))
            except Exception:  # a required field is missing
                continue
            assert kept != misspelt(values, path), (kind, path)


def test_a_train_job_runs_the_words_of_train_main_under_torchrun(capsys):
    spec = objects(capsys, LINE)["TrainJob"]["spec"]
    trainer = spec["trainer"]
    assert shlex.join([*trainer["command"], *trainer["args"]]) == f"torchrun train/main.py {WORDS}"
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": "8"}}


def test_a_pod_of_a_job_runs_the_same_words_on_its_node(monkeypatch, capsys):
    found = objects(capsys, f"{LINE} form=job job_name=first")
    spec = found["Job"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    args = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    assert (
        container["command"] == ["python"] and args[:2] == ["-m", "launch.node"] and not [w for w in args if "$" in w]
    )
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", ["", *args[2:], "dry_run=true"])
    monkeypatch.setattr(node, "connected", lambda one: replace(one, address="ADDRESS"))  # the name is known in a pod
    node.main()
    own = capsys.readouterr().out
    where = "--nnodes=2 --node_rank=1 --master_addr=first-0.first --master_port=29500 --local_addr=ADDRESS"
    assert own == f"torchrun {where} --nproc_per_node=8 train/main.py {WORDS}\n"
    lines = printed(capsys, f"{LINE} form=job job_name=first dry_run=true").splitlines()
    assert lines[1] == own.strip() and len(lines) == 2


def test_the_service_names_the_pods_of_the_job(capsys):
    found = objects(capsys, f"{LINE} form=job job_name=first")
    service, pod = found["Service"], found["Job"]["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"] == found["Job"]["metadata"]["name"] == "first"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "first"}
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)


def test_a_pod_that_saved_starts_again_and_wrong_input_ends_the_job(capsys):
    spec = objects(capsys, "strategy=dp form=job")["Job"]["spec"]
    rules = {
        (rule["action"], *rule.get("onExitCodes", {}).get("values", [])) for rule in spec["podFailurePolicy"]["rules"]
    }
    assert rules == {("Ignore",), ("Ignore", EXIT_SAVED), ("FailJob", EXIT_INPUT, EXIT_STOPPED)}
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "which this policy needs"
    assert "resources" not in spec["template"]["spec"]["containers"][0], "no GPUs were asked for"


WRONG = {
    "nodes=2 nproc=3": (2, "nproc=3 is not divisible by nodes=2"),
    "strategy=tp strategy.tp=3 gpus_per_node=2": (2, "strategy.tp=3"),
    "job_name=A": (2, "job_name=A is not valid"),
    "strategy=dp model=llama_70b hardware=h100_sxm precision=bf16 gpus_per_node=8": (3, "hardware=h100_sxm has"),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_prints_no_yaml(line, capsys):
    with pytest.raises(SystemExit) as ended:
        launcher.main(line.split())
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (WRONG[line][0], "") and WRONG[line][1] in said.err


def test_the_image_has_what_a_pod_runs():
    text = (REPO / "launch/Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]]
    assert {"train", "launch", "scripts", "configs", "constraints.txt", "pyproject.toml"} <= {*copied}
    assert all((REPO / name).exists() for name in copied)
    assert re.findall(r"^FROM \S+ AS (\w+)$", text, re.M) == ["base", "cpu", "cuda"] and "WORKDIR /lab\n" in text
    assert re.search(r"^torch==", (REPO / "constraints.txt").read_text(), re.M), "which the image for CPUs looks up"
