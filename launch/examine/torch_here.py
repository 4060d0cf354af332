"""Judges what ranks.py found: torch, its backends, the devices and an all-reduce of two ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.examine.child import MORE_TIME, Answers
from launch.examine.finding import Finding, error, ok, warning

SLOW_IMPORT_S = 20.0  # every rank imports torch before its first step
GiB = 2**30
LEAST_FREE = 0.5  # the share of a device's memory that should be free before a run
ALL_REDUCE = "all-reduce"
SHORT_S = 5.0  # two ranks that had less time to sum a tensor may only be slow, as after the start of a machine
DRIVER = "look at the driver (nvidia-smi, dmesg); CUDA_VISIBLE_DEVICES= hides the GPUs, and runs are on the CPU"


def judge(answers: Answers, env: Mapping[str, str], *, nvidia: bool) -> list[Finding]:
    """`nvidia`: whether the system has NVIDIA devices, as far as files in /dev show."""
    said = answers.found
    driver = f"{MORE_TIME}; if it still does not answer, {DRIVER}" if answers.late else DRIVER
    if "torch" not in said and answers.late:
        fix = f"{MORE_TIME}; put the environment on a local disk if it is on a network file system"
        return [error("torch", f"torch is not imported: {answers.end}", fix)]
    if "torch" not in said:
        message = f"torch cannot be imported: {answers.end or 'no reason is known'}"
        return [error("torch", message, "install it again: python -m pip install --force-reinstall torch")]
    found = [_import(said)]
    if not said.get("distributed", True):
        message = f"torch {said['torch']} was built without torch.distributed, so no strategy can run"
        return [*found, error("backends", message, "install another build of torch: https://pytorch.org")]
    found.append(_backends(said))
    if "devices" not in said:
        message = f"what torch sees is not known: {answers.end or 'its process gave no answer'}"
        return [*found, error("devices", message, driver)]
    devices = said["devices"]
    if "error" in devices:
        if "fix" in devices:
            return [*found, error("devices", devices["error"], devices["fix"])]
        return [*found, error("devices", f"the devices cannot be used: {devices['error']}", DRIVER)]
    return [*found, *_devices(said, env, nvidia=nvidia), _all_reduce(answers)]


def _import(said: Mapping[str, Any]) -> Finding:
    seconds, version = said["import_s"], said["torch"]
    shown = f"torch {version} is imported in {seconds:.1f} s"
    values = {"version": version, "cuda": said.get("cuda"), "import_s": seconds}
    if seconds <= SLOW_IMPORT_S:
        return ok("torch", shown, **values)
    message = f"{shown}: every rank waits as long before its first step"
    return warning("torch", message, "put the environment on a local disk instead of a network file system", **values)


def _backends(said: Mapping[str, Any]) -> Finding:
    names = said.get("backends", [])
    if "gloo" in names:
        return ok("backends", ", ".join(names), backends=names)
    message = f"this build of torch has {', '.join(names) or 'no backend'}, but no gloo, which runs on a CPU need"
    return error("backends", message, "install another build of torch: https://pytorch.org", backends=names)


def _devices(said: Mapping[str, Any], env: Mapping[str, str], *, nvidia: bool) -> list[Finding]:
    devices = said["devices"]
    found, listed = [], devices["devices"]
    where = f"runs are on {devices['device']} over {devices['backend']}"
    for index, one in enumerate(listed):
        if one["total"] is None:
            found.append(ok("devices", f"{index}: {one['name']}", **one))
            continue
        shown = f"{index}: {one['name']}, {one['free'] / GiB:.1f} of {one['total'] / GiB:.1f} GiB are free"
        if one["free"] >= LEAST_FREE * one["total"]:
            found.append(ok("devices", shown, **one))
        else:
            fix = "end the programs that use it (nvidia-smi lists them), or choose others with CUDA_VISIBLE_DEVICES"
            found.append(warning("devices", f"{shown}: other programs use it", fix, **one))
    if nvidia and not listed:
        return [*found, _unseen(said, env)]
    shown = devices["note"] or (where if listed else f"no accelerator: {where}")
    return [*found, ok("devices", shown, device=devices["device"], backend=devices["backend"])]


def _unseen(said: Mapping[str, Any], env: Mapping[str, str]) -> Finding:
    """Why torch does not see NVIDIA devices that are there."""
    message = "this machine has NVIDIA devices, but torch sees none, so runs are on the CPU"
    if env.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        hidden = f"CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']} hides them"
        return warning("devices", f"{message}: {hidden}", "unset CUDA_VISIBLE_DEVICES")
    if not said.get("cuda"):
        why = f"torch {said['torch']} is a build without CUDA"
        return warning("devices", f"{message}: {why}", "install a build of torch with CUDA: https://pytorch.org")
    why = f"torch {said['torch']} is built for CUDA {said['cuda']}, which the driver may be too old for"
    return warning("devices", f"{message}: {why}", "compare with nvidia-smi; install a newer driver or another build")


def _all_reduce(answers: Answers) -> Finding:
    ranks = {name: answers.found[name] for name in ("rank_0", "rank_1") if name in answers.found}
    fix = "see the other findings; unset NCCL_* and GLOO_* variables, and try runtime.device=cpu"
    fix = f"{MORE_TIME}; if it still does not answer, {fix}" if answers.late else fix
    bad = {name.replace("_", " "): one for name, one in ranks.items() if "error" in one}
    if bad:
        # a rank that was lost makes the other one fail too
        first, why = min(bad.items(), key=lambda item: not item[1].get("lost", False))
        message = f"two ranks cannot sum a tensor: {first}: {why['error']}"
        return error(ALL_REDUCE, message, why.get("fix", fix))
    ready_s = answers.found.get("ready_s", answers.seconds)
    if len(ranks) < 2 and answers.late and (had := answers.seconds - ready_s) < SHORT_S:
        why = f"torch and the devices needed {ready_s:.1f} s, so that two ranks had only {had:.1f} s"
        return warning(ALL_REDUCE, f"whether two ranks can sum a tensor is not known: {why}", MORE_TIME)
    if len(ranks) < 2:
        return error(ALL_REDUCE, f"two ranks cannot sum a tensor: {answers.end or 'a rank gave no answer'}", fix)
    one = ranks["rank_0"]
    where = f"2 ranks on {one['device']} over {one['backend']}"
    return ok(ALL_REDUCE, f"{where} sum {one['mib']:g} MiB in {one['all_reduce_ms']:.1f} ms", **one)
