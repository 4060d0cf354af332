"""`--help`, the sentences of keys, docs/configuration.md, and the options that tools take beside the config's keys."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import doctor, explain, kubernetes, local, netlab, node, slurm, sweep
from scripts import soak, verify, write_configuration
from tests.wrong_options import SWITCHES, WRONG
from train import main as training
from train.command import cli, options
from train.command.help import described
from train.command.help.hints import unknown_key
from train.command.launching import nodes
from train.command.schemas import SCHEMAS
from train.config.problems import BadInput

REPO = Path(__file__).resolve().parent.parent
LOCAL, EXPLAIN, SWEEP, VERIFY = options.LOCAL, options.EXPLAIN, options.SWEEP, options.VERIFY
DOCTOR, SOAK = options.DOCTOR, options.SOAK
ON_NODE, SLURM, KUBERNETES, NETLAB = nodes.ON_NODE, nodes.SLURM, nodes.KUBERNETES, nodes.NETLAB
TOOLS = (LOCAL, EXPLAIN, SWEEP, VERIFY, DOCTOR, SOAK, ON_NODE, SLURM, KUBERNETES, NETLAB, "train/main.py")


@pytest.fixture(autouse=True)
def terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


def answer(tool, line, monkeypatch, capsys):
    """(Exit code, standard output, standard error) of a tool that ends before it starts a process."""
    words = line.split()
    monkeypatch.setattr(sys, "argv", [tool, *words])
    mains: dict[str, Callable[[], object]] = {LOCAL: local.main, EXPLAIN: explain.main, "train/main.py": training.main}
    mains |= {DOCTOR: doctor.main, SWEEP: lambda: sweep.main(words), VERIFY: lambda: verified(words)}
    mains |= {SOAK: lambda: soak.main(words), ON_NODE: node.main, NETLAB: lambda: netlab.main(words)}
    mains |= {SLURM: lambda: slurm.main(words), KUBERNETES: lambda: kubernetes.main(words)}
    with pytest.raises(SystemExit) as ended:
        mains[tool]()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def verified(words):
    try:
        verify.read(words)
    except BadInput as error:
        print(error.report(), file=sys.stderr)
        raise SystemExit(error.exit_code) from None


@pytest.mark.parametrize("place", SCHEMAS, ids=str)
def test_every_key_has_its_sentence(place):
    group, _ = place
    for key in described.keys(SCHEMAS[place], group or ""):
        assert key.help.endswith(".") and key.help[0].isupper() and len(key.help.split()) > 1, key


def test_every_group_and_option_has_its_sentence():
    nodes = dataclasses.fields(SCHEMAS[None, "_config"])
    assert all(field.metadata["help"].endswith(".") for field in nodes)
    assert all(one.help.endswith(".") and one.read(one.example) is not None for one in options.OPTIONS)


def test_the_page_of_keys_is_what_its_script_writes():
    said = "run python scripts/write_configuration.py: a key, an option or a preset has changed"
    assert write_configuration.PATH.read_text() == write_configuration.text(), said


COMPOSED = [
    ("strategy=pp train.steps=20", "strategy.schedule=1f1b", "strategy.whole_below"),
    ("strategy=ds_zero3 model=moe_tiny", "strategy.whole_below=0", "strategy.schedule"),
    ("optim=sgd data.path=a", "data.path=a ", "strategy.schedule"),
]


@pytest.mark.parametrize(("line", "has", "lacks"), COMPOSED)
def test_help_shows_the_composed_keys(line, has, lacks, monkeypatch, capsys):
    code, out, err = answer(LOCAL, f"{line} --help", monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert has in out and lacks not in out
    assert max(map(len, out.splitlines())) <= 80
    config, *_ = cli.parse(cli.parser("test", ""), line.split())
    squeezed = " ".join(out.split())
    for group in ("strategy", "model", "data", "optim", "hardware", "train", "compile", "runtime", "metrics"):
        for key in described.keys(type(getattr(config, group)), group):
            assert f"\n  {key.name}=" in out
            assert key.values in squeezed and key.help in squeezed, key
    for one in options.of(LOCAL):
        assert one.help in squeezed and one.must in squeezed
    assert "\n  precision=float32 " in out and "Presets: llama_1b, llama_405b" in out


def test_help_tells_a_given_value_from_the_preset_s(monkeypatch, capsys):
    _, out, _ = answer(LOCAL, "strategy=pp train.steps=20 strategy.pp=2 --help", monkeypatch, capsys)
    squeezed = " ".join(out.split())
    assert "train.steps=20 integer from 1 to 1,000,000,000 (default 100)" in squeezed
    assert "strategy.pp=2 integer or null (default -1)" in squeezed
    assert "strategy=pp: How the work" in squeezed and "pp: Pipeline parallelism" in squeezed
    assert squeezed.count("(default") == 3, "port has no number of its own"


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_shows_its_own_options(tool, monkeypatch, capsys):
    several = "strategy=pp,tp" if tool in (EXPLAIN, SWEEP, VERIFY, SOAK, SLURM, NETLAB) else "strategy=pp"
    code, out, err = answer(tool, f"-h {several}", monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert "strategy=pp: How the work" in out
    for one in options.OPTIONS:
        assert (f"\n  {one.name}=" in out) == (tool in one.tools), one.name
    assert ("--cfg job" in out) == (tool not in (SWEEP, NETLAB)), "which refuse it"
    assert ("--json" in out, "--html FILE" in out) == (tool == DOCTOR, tool == VERIFY)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--help strategy=foo", "strategy=foo does not name a preset"),
        ("train.stepss=3 --help", "did you mean train.steps"),
        ("-h train.steps=abc", "Value 'abc'"),
    ],
)
def test_a_bad_override_beside_help_has_its_usual_message(tool, line, says, monkeypatch, capsys):
    code, out, err = answer(tool, line, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert says in err and err.count("nothing was trained") == 1


@pytest.mark.parametrize("tool", [EXPLAIN, SWEEP, VERIFY, SOAK, SLURM, NETLAB])
def test_a_bad_value_among_several_has_its_usual_message(tool, monkeypatch, capsys):
    code, out, err = answer(tool, "strategy=dp,foo --help", monkeypatch, capsys)
    assert (code, out) == (2, "") and "strategy=foo does not name a preset" in err


def test_help_needs_no_torch(tmp_path):
    script = (
        "import sys; from launch import local\n"
        "try: local.main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, "strategy=pp", "--help"]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "False\n")


HINTS = [
    (LOCAL, "nprocs=4", "did you mean nproc?"),
    (LOCAL, "+nprocs=4", "did you mean nproc?"),
    (LOCAL, "NPROC=4", "did you mean nproc?"),
    (LOCAL, "+nproc=4", "write it as nproc=4, without a prefix"),
    (LOCAL, "prt=29500", "did you mean port?"),
    (LOCAL, "forced=true", "did you mean force?"),
    (LOCAL, "--nproc=4", "keys and options are written without dashes"),
    (LOCAL, "nproc", "nproc is not a valid override"),
    (LOCAL, "batchs=micro", f"did you mean batch (an option of {SWEEP})?"),
    (LOCAL, "steps=9", "did you mean steps (an option of scripts/bench_step.py) or train.steps?"),
    (LOCAL, "train.micro_batch=2", "did you mean train.micro_batch_size?"),
    (LOCAL, "zzz=1", "zzz is not a key of the config: see --help"),
    (EXPLAIN, "nprocs=2,4", "did you mean nproc?"),
    (SWEEP, "skip-invalid=true", "did you mean skip_invalid?"),
    (SWEEP, "freshly=true", "did you mean fresh?"),
    (VERIFY, "nproc_=4", "did you mean nproc?"),
    (DOCTOR, "nprocs=4", "did you mean nproc?"),
    ("train/main.py", "nprocs=4", f"did you mean nproc (an option of {LOCAL}, "),
]


@pytest.mark.parametrize(("tool", "word", "says"), HINTS)
def test_a_misspelt_option_is_told_what_was_meant(tool, word, says, monkeypatch, capsys):
    code, out, err = answer(tool, word, monkeypatch, capsys)
    assert (code, out) == (2, "") and says in err


WRONG_TOOL = [
    (tool, option)
    for tool in TOOLS
    for option in options.OPTIONS
    if tool not in option.tools and option is not options.STEPS  # which may be meant for train.steps
]
# every option with one of the tools, in turn, so that each tool has its turn too
WITH_HYDRA = [
    foreign[number % len(foreign)]
    for number, option in enumerate(options.OPTIONS)
    if (foreign := [pair for pair in WRONG_TOOL if pair[1] is option])
]


def is_told_where_it_belongs(tool, option, monkeypatch, capsys):
    code, out, err = answer(tool, f"{option.name}={option.example}", monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert f"{option.name} is an option of {option.tools[0]}" in err and f"{tool} does not take it" in err
    assert ("--nproc_per_node=N" in err) == (option is options.NPROC)


@pytest.mark.parametrize(("tool", "option"), WITH_HYDRA, ids=lambda one: getattr(one, "name", one))
def test_an_option_of_another_tool_is_told_where_it_belongs(tool, option, monkeypatch, capsys):
    is_told_where_it_belongs(tool, option, monkeypatch, capsys)


@pytest.mark.parametrize(("tool", "option"), WRONG_TOOL, ids=lambda one: getattr(one, "name", one))
def test_no_tool_takes_an_option_of_another_one(tool, option, monkeypatch, capsys):
    """Without Hydra, which takes most of the time: what the tool leaves in its line is the option, as it was typed."""

    def refuse(overrides, tool):
        assert overrides == [f"{option.name}={option.example}"]
        raise BadInput(unknown_key(option.name, tool))

    monkeypatch.setattr(cli, "_compose", refuse)
    is_told_where_it_belongs(tool, option, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("option", "text"),
    [(one, text) for one in options.OPTIONS for text in (WRONG | SWITCHES)[one.name]],
    ids=lambda one: getattr(one, "name", str(one)[:6]),
)
def test_a_wrong_value_of_an_option_is_refused(option, text):
    argv = ["strategy=tp", f"{option.name}={text}", f"{option.name}={option.example}"]
    with pytest.raises(BadInput) as refused:
        option.pop(argv)
    (problem,) = refused.value.problems
    assert problem.message.startswith(f"{option.name}={text[:60]}") and f"{option.name} must be" in problem.message
    assert option.read(problem.fix.split("=")[1].split(",")[0]) is not None, "what it proposes is valid"
    assert len(str(problem)) < 250


def test_the_last_value_of_an_option_counts():
    argv = ["nproc=2", "strategy=tp", "nproc=4", "force=true", "force=false"]
    assert options.NPROC.pop(argv) == 4 and options.FORCE.pop(argv) is False
    assert argv == ["strategy=tp"]
    assert options.PORT.pop(argv) is None and options.BATCH.pop(argv) == "global"
