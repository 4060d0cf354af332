"""Run folders that are broken or malicious: how a good folder is changed, how it is treated, and the message."""

import json
import os

SKIPPED = "skipped"  # the folder is not compared
NOTED = "noted"  # it is compared, and a line says what is left out
TAKEN = "taken"  # it is compared, and what it holds does no harm
NINES = "9" * 400
DEEP = "[" * 5000 + "]" * 5000
ESCAPES = "\x1b[2J\x1b]0;title\x07\u202e\x00\r\n<script>alert(1)</script>$\\frac{"


def fifo(name):
    def act(run):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return act


def link(name, target):
    def act(run):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)

    return act


def folder(name):
    def act(run):
        (run / name).unlink()
        (run / name).mkdir()

    return act


def write(name, content):
    def act(run):
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return act


def values(name, **new):
    """Replace values in the JSON file."""

    def act(run):
        (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | new))

    return act


def sparse(name, size):
    def act(run):
        with (run / name).open("wb") as file:
            file.truncate(size)

    return act


def lines(**new):
    """Replace values in every line of metrics.jsonl. They are written literally."""

    def act(run):
        found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(line | new) + "\n" for line in found)
        (run / "metrics.jsonl").write_text(text.replace('"RAW', "").replace('RAW"', ""))

    return act


def laughs():
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(["l0: &l0 [ha, ha, ha]", *levels])


def sample(**new):
    return values("samples/step-10.json", **new)


RANK = {"rank": 0, "timeline": [], "memory": {"at_peak_mib": {"parameters": 1.0}}}
FOLDERS = {
    # what is no file
    "config_fifo": (fifo("config.yaml"), SKIPPED, "config.yaml is not a regular file"),
    "work_fifo": (fifo("work.json"), SKIPPED, "work.json is not a regular file"),
    "summary_fifo": (fifo("summary.json"), SKIPPED, "summary.json is not a regular file"),
    "metrics_fifo": (fifo("metrics.jsonl"), SKIPPED, "metrics.jsonl is not a regular file"),
    "sample_fifo": (fifo("samples/step-10.json"), NOTED, "step-10.json is not a regular file"),
    "events_fifo": (
        lambda run: (fifo("events.out.tfevents.1.x")(run), (run / "metrics.jsonl").unlink()),
        SKIPPED,
        "not a regular file",
    ),
    "config_folder": (folder("config.yaml"), SKIPPED, "config.yaml is not a regular file"),
    "metrics_folder": (folder("metrics.jsonl"), SKIPPED, "metrics.jsonl is not a regular file"),
    # links
    "zero": (link("summary.json", "/dev/zero"), SKIPPED, "summary.json is a link that leads out of the folder"),
    "zero_metrics": (
        link("metrics.jsonl", "/dev/zero"),
        SKIPPED,
        "metrics.jsonl is a link that leads out of the folder",
    ),
    "link_out": (link("work.json", "/etc/passwd"), SKIPPED, "work.json is a link that leads out of the folder"),
    "link_up": (
        link("config.yaml", "../good-dp/config.yaml"),
        SKIPPED,
        "config.yaml is a link that leads out of the folder",
    ),
    "link_round": (link("config.yaml", "config.yaml"), SKIPPED, "config.yaml is not a regular file"),
    "link_nowhere": (link("metrics.jsonl", "gone"), SKIPPED, "metrics.jsonl cannot be read"),
    "link_inside": (
        lambda run: ((run / "summary.json").rename(run / "s.json"), link("summary.json", "s.json")(run)),
        TAKEN,
        "",
    ),
    # torn, empty, of another kind
    "torn_summary": (write("summary.json", '{"steps": 12, "perf/'), SKIPPED, "summary.json is not valid JSON"),
    "torn_work": (write("work.json", '{"work": {'), SKIPPED, "work.json is not valid JSON"),
    "empty_summary": (write("summary.json", ""), SKIPPED, "summary.json is empty"),
    "empty_config": (write("config.yaml", ""), SKIPPED, "config.yaml is empty"),
    "empty_metrics": (write("metrics.jsonl", ""), TAKEN, ""),
    "list_summary": (write("summary.json", "[1, 2]"), SKIPPED, "summary.json does not contain an object"),
    "text_config": (write("config.yaml", "hello"), SKIPPED, "config.yaml does not contain an object"),
    "torn_config": (write("config.yaml", "strategy: {name: tp"), SKIPPED, "config.yaml is not valid YAML"),
    "latin_config": (write("config.yaml", b"strategy: {name: \xff\xfe}"), SKIPPED, "config.yaml is not UTF-8 text"),
    "binary_metrics": (write("metrics.jsonl", bytes(range(256)) * 100), NOTED, "line(s) cannot be read"),
    "torn_sample": (write("samples/step-10.json", '{"ranks": [{"rank'), NOTED, "step-10.json is not valid JSON"),
    "garbage_events": (
        lambda run: (run / "metrics.jsonl").rename(run / "events.out.tfevents.1.x"),
        TAKEN,
        "",
    ),
    # large
    "huge_summary": (sparse("summary.json", 2**40), SKIPPED, "summary.json is larger than"),
    "huge_config": (sparse("config.yaml", 2**40), SKIPPED, "config.yaml is larger than"),
    "huge_metrics": (sparse("metrics.jsonl", 2**40), NOTED, "because it is very large"),
    "huge_sample": (sparse("samples/step-10.json", 2**40), NOTED, "step-10.json is larger than"),
    "huge_events": (
        lambda run: (sparse("events.out.tfevents.1.x", 2**40)(run), (run / "metrics.jsonl").unlink()),
        SKIPPED,
        "event files are larger",
    ),
    "deep_json": (write("summary.json", '{"a": ' + DEEP + "}"), SKIPPED, "nested more than"),
    "deeper_json": (write("work.json", '{"a": ' + "[" * 200000 + "}"), SKIPPED, "work.json"),
    "deep_yaml": (write("config.yaml", "a: " + DEEP), SKIPPED, "nested more than"),
    "deep_line": (write("metrics.jsonl", '{"step": ' + "[" * 200000 + "\n"), NOTED, "line(s) cannot be read"),
    "laughs": (write("config.yaml", laughs()), SKIPPED, "anchors or aliases"),
    "yaml_loop": (write("config.yaml", "a: &a [*a]"), SKIPPED, "anchors or aliases"),
    "yaml_object": (write("config.yaml", "a: !!python/object/apply:os.system [exit 1]"), SKIPPED, "tags"),
    "yaml_base60": (write("config.yaml", "a: " + ":".join(["59"] * 50000)), SKIPPED, "longer than a config can be"),
    "yaml_date": (write("config.yaml", "a: 2001-99-99"), SKIPPED, "config.yaml"),
    "yaml_list_key": (write("config.yaml", "? [a, b]\n: 1"), SKIPPED, "config.yaml"),
    # numbers
    "digits_summary": (write("summary.json", f'{{"steps": {NINES}}}'), SKIPPED, "a number of 400 digits"),
    "digits_config": (write("config.yaml", f"train: {{seed: {NINES}}}"), SKIPPED, "more than 20 digits"),
    "digits_hex": (write("config.yaml", f"train: {{seed: 0x{NINES}}}"), SKIPPED, "more than 20 digits"),
    "digits_5000": (write("summary.json", f'{{"steps": {"9" * 5000}}}'), SKIPPED, "a number of 5,000 digits"),
    "digits_loss": (lines(**{"train/loss": f"RAW{NINES}RAW"}), NOTED, "line(s) cannot be read"),
    "digits_step": (lines(step=f"RAW{NINES}RAW"), NOTED, "line(s) cannot be read"),
    "digits_rank": (lines(**{"memory_by_rank/parameters_mib/rank_" + "9" * 150: 1.0}), TAKEN, ""),
    "huge_speed": (lines(**{"perf/tokens_per_s": 1e308, "perf/step_ms": 1e-308}), TAKEN, ""),
    "infinite": (lines(**{"train/loss": float("inf"), "perf/tokens_per_s": float("-inf")}), TAKEN, ""),
    "nulls": (lines(**{"train/loss": None, "perf/tokens_per_s": None, "perf/step_ms": None}), TAKEN, ""),
    "minus": (lines(**{"perf/tokens_per_s": -5.0, "perf/step_ms": -1.0, "comm/tp/send_mib": -3.0}), TAKEN, ""),
    "zeros": (lines(**{"perf/tokens_per_s": 0.0, "train/loss": 0.0, "comm/tp/send_mib": 0.0}), TAKEN, ""),
    "far_future": (lines(time=1e300), TAKEN, ""),
    "warmup_minus": (
        values("summary.json", warmup_steps=-(10**9)),
        SKIPPED,
        "warmup_steps is -1000000000, not a whole",
    ),
    "warmup_text": (values("summary.json", warmup_steps="many"), SKIPPED, "warmup_steps is many, not a whole number"),
    # types
    "world_text": (values("work.json", world_size="two"), SKIPPED, "world_size is two, not a whole number"),
    "world_list": (values("summary.json", world_size=[2]), SKIPPED, "world_size is [2], not a whole number"),
    "degrees_list": (values("work.json", degrees=[2]), SKIPPED, "degrees is [2], not an object"),
    "degrees_text": (values("summary.json", degrees={"tp": "two"}), SKIPPED, "degrees is"),
    "lossy_text": (values("work.json", lossy="much"), SKIPPED, "lossy is much, not an object or null"),
    "differs_list": (values("work.json", differs=["loss"]), SKIPPED, "differs is"),
    "work_text": (values("work.json", work="hard"), SKIPPED, "work is hard, not an object"),
    "work_empty": (values("work.json", work={}), TAKEN, ""),
    "work_odd": (values("work.json", work={"model": "x", "train": [1], "data": None, "optim": 5}), TAKEN, ""),
    "hash_list": (values("summary.json", work_hash=["a"]), SKIPPED, "work_hash is"),
    "from_environment": (
        write(
            "config.yaml",
            "strategy: {name: '${oc.env:S}'}\nprecision: '${oc.env:P}'\ntrain: {steps: '${oc.env:N}'}\n"
            "metrics: {warmup_steps: '${oc.env:W}'}\n",
        ),
        TAKEN,
        "",
    ),
    "name_number": (write("config.yaml", "strategy: {name: 5}"), SKIPPED, "strategy.name is 5, not a text"),
    "strategy_list": (write("config.yaml", "strategy: [tp]"), SKIPPED, "strategy is ['tp'], not an object"),
    "loss_text": (lines(**{"train/loss": "low", "time": "now"}), TAKEN, ""),
    "loss_list": (lines(**{"train/loss": [1.0], "perf/step_ms": {}}), TAKEN, ""),
    "steps_minus": (lines(step=-1), NOTED, "line(s) cannot be read"),
    "steps_text": (lines(step="one"), NOTED, "line(s) cannot be read"),
    "ranks_text": (sample(ranks="all"), NOTED, "ranks is not a list"),
    "ranks_numbers": (sample(ranks=[1, 2]), NOTED, "ranks are not all objects"),
    "ranks_twice": (sample(ranks=[RANK, RANK]), NOTED, "ranks are not all objects"),
    "ranks_many": (sample(ranks=[RANK] * 5000), NOTED, "ranks is not a list of 1 to 4,096"),
    "rank_text": (sample(ranks=[RANK | {"rank": "0"}]), NOTED, "ranks are not all objects"),
    "memory_text": (sample(ranks=[RANK | {"memory": "much"}]), TAKEN, ""),
    "memory_list": (sample(ranks=[RANK | {"memory": {"at_peak_mib": [1]}}]), TAKEN, ""),
    "piece_short": (sample(ranks=[RANK | {"timeline": [["F", 0]]}]), NOTED, "a timeline is not"),
    "piece_text": (sample(ranks=[RANK | {"timeline": [["F", 0, 0, "a", "b"]]}]), NOTED, "a timeline is not"),
    "piece_back": (
        sample(ranks=[RANK | {"timeline": [["F", 0, 0, 5, 1], ["B", 1, 0, 5, 1e308]]}]),
        NOTED,
        "a timeline is not",
    ),
    "piece_zero": (sample(ranks=[RANK | {"timeline": [["F", 0, 0, 0, 0], ["B", 1, 0, 0, 0]]}]), TAKEN, ""),
    "piece_many": (sample(ranks=[RANK | {"timeline": [["F", i % 2, i, i, i + 1] for i in range(20000)]}]), TAKEN, ""),
    # text
    "escapes": (values("work.json", strategy=ESCAPES, device=ESCAPES, commit=ESCAPES, command=ESCAPES), TAKEN, ""),
    "escapes_name": (write("config.yaml", "strategy: {name: " + json.dumps(ESCAPES) + "}"), TAKEN, ""),
    "long_name": (write("config.yaml", f"strategy: {{name: {'x' * 4000}}}"), TAKEN, ""),
    "math_name": (write("config.yaml", "strategy: {name: '$\\frac{'}"), TAKEN, ""),
    "hidden_name": (write("config.yaml", "strategy: {name: _tp}"), TAKEN, ""),
    "no_name": (write("config.yaml", "strategy: {name: ''}"), TAKEN, ""),
    "odd_tags": (
        lines(**{"comm/_x/send_mib": 1.0, "comm//_mib": 2.0, "time/\u202e_ms": 3.0}),
        TAKEN,
        "",
    ),
    "surrogate": (write("summary.json", '{"device": "\\ud800"}'), TAKEN, ""),
    "environment": (write("config.yaml", "strategy: {name: '${oc.env:HOME}', tp: -1}"), TAKEN, ""),
}
