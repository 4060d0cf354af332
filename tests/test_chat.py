"""scripts/chat.py on the run of another test, and what tokens say."""

import dataclasses
import io
import json
import os
import pty
import random
import select
import subprocess
import sys

import pytest
import torch

from scripts import chat
from scripts.generating.words import ByteWords, Told, words_of
from tests.saved_runs import ENV, REPO, SMALL, flipped, newest
from train.checkpoint.whole.trained import open_trained, validation_loss
from train.command import cli
from train.config.problems import BadInput

MOST = 16  # train.seq_len of the run


def expected(run, prompt, count):
    """The most likely bytes after the prompt, by the whole forward."""
    model, ids = open_trained(run).model(), [*prompt.encode()]
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt.encode()) :]


def shown(ids):
    return ByteWords(256).reader().read(ids, last=True)


def test_an_answer_is_printed_with_its_speed(run, capsys):
    assert chat.main([str(run), "--prompt", "The", "--tokens", "6"]) == 0
    said = capsys.readouterr()
    assert said.out == shown(expected(run, "The", 6)) + "\n"
    assert said.err.startswith("first token after ") and said.err.endswith(" tokens/s\n")
    assert chat.main([str(newest(run)), "--prompt", "The"]) == 0  # 256 tokens, which the model has no positions for
    said = capsys.readouterr()
    assert said.out == shown(expected(run, "The", MOST - 2)) + "\n"
    limit = f"the answer ends because the model reads at most model.max_seq_len={MOST} tokens, with the prompt"
    assert said.err.splitlines()[1:] == [limit]


def test_a_batch_as_json(run, capsys):
    assert chat.main([str(run), "--prompt", "The", "--json", "--prompt", "class A", "--tokens", "6"]) == 0
    said = capsys.readouterr()
    first, second = map(json.loads, said.out.splitlines())
    for one, prompt in ((first, "The"), (second, "class A")):
        ids = expected(run, prompt, 6)
        assert (one["prompt"], one["tokens"], one["text"], one["ended"]) == (prompt, ids, shown(ids), "tokens")
        assert one["first_token_ms"] > 0 and one["tokens_per_s"] > 0 and one["step"] == 4
        assert one["sha256"] == open_trained(run).sha256
    assert said.err == ""


def test_an_answer_ends_before_its_stop(run, capsys):
    free = expected(run, "The", 10)
    stop = next(bytes([byte]).decode() for byte in free if byte < 127)
    assert chat.main([str(run), "--prompt", "The", "--json", f"stop={stop}"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["ended"] == "stop" and one["text"] == shown(free[: free.index(ord(stop))])


def test_typed_lines_are_prompts_and_a_wrong_one_costs_itself(run, capsys, monkeypatch):
    typed = b"The\n\n" + b"x" * 17 + b"\nclass\xff"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    assert chat.main([str(run), "--tokens", "4", "--json"]) == 2
    said = capsys.readouterr()
    prompts = [json.loads(line)["prompt"] for line in said.out.splitlines()]
    assert prompts == ["The", "class\udcff"]
    refused = f"the prompt has 17 tokens, but the model reads at most model.max_seq_len={MOST}: give a shorter prompt\n"
    assert said.err == refused


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--prompt", ""], 2, "the prompt is empty, but the model needs a token to go on from: give a prompt of one"),
        (["--prompt", "x" * 99], 2, "the prompt has 99 tokens, but the model reads at most model.max_seq_len=16: give"),
        (["--prompt", "x", "--tokens", "0"], 2, "--tokens=0 is not valid: --tokens must be a positive integer"),
        (["temperature=hot"], 2, "temperature=hot is not valid: temperature must be a number from 0 to 1,000: use"),
        (["temperature=-1"], 2, "temperature=-1 is not valid"),
        (["temperature=nan"], 2, "temperature=nan is not valid"),
        (["top_k=0"], 2, "top_k=0 is not valid: top_k must be a positive integer"),
        (["seed=-1"], 2, "seed=-1 is not valid"),
        (["top-k=3"], 2, "top-k=3 is not an option of scripts/chat.py: use temperature=, top_k=, seed=, stop="),
        (["runtime.device=tpu"], 2, "runtime.device=tpu is not valid: runtime.device must be auto, cpu or cuda"),
        (["runtime.device=cuda"], 3, "runtime.device=cuda, but this machine has no cuda device: use runtime.device="),
        (["--prompt", "x"] * 257, 2, "257 prompts are more than the 256 of a batch: give 256 or fewer"),
    ],
)
def test_what_is_wrong_is_said_once(words, code, says, run, capsys):
    if code == 3 and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    found, said = refused(capsys, str(run), *words)
    assert (found, said.out) == (code, "") and said.err.startswith(says)
    assert said.err.count("\n") == (2 if code == 3 else 1), "and the doctor, where the machine is to blame"


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        chat.main([*words])
    return stop.value.code, capsys.readouterr()


def test_runs_without_a_good_checkpoint(run, tmp_path, capsys):
    flipped(newest(run))
    for path, says in {
        tmp_path / "nothing": "has no checkpoint, as there is no such folder",
        tmp_path: "has no checkpoint",
        newest(run): "has no good checkpoint",
    }.items():
        code, said = refused(capsys, str(path), "--prompt", "x")
        assert (code, said.out, said.err.count("\n")) == (2, "", 1) and says in said.err


@pytest.mark.timeout(100)
def test_a_terminal_is_answered_until_it_ends(run):
    ours, theirs = pty.openpty()
    command = [sys.executable, str(REPO / "scripts" / "chat.py"), str(run), "--tokens", "4"]
    env = ENV | {"TERM": "dumb"}  # without codes of colours and of pasted text
    with subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        try:
            until(ours, "> ")
            os.write(ours, b"The\n")
            said = until(ours, "\n> ")
            assert said.startswith("The\n") and len(said) > len("The\n\n> "), said
            os.write(ours, b"\x04")
            errors = process.communicate(timeout=60)[1]
            assert (process.returncode, errors.count(b"first token after")) == (0, 1)
        finally:
            process.kill()
            os.close(ours)


def until(terminal, end):
    """What the program prints next, up to this end."""
    said = ""
    while not said.endswith(end):
        assert select.select([terminal], [], [], 80)[0], f"only {said!r} has come"
        said += os.read(terminal, 1000).decode().replace("\r\n", "\n")
    return said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_on_four_ranks_answers_like_its_whole_model(tmp_path, capsys):
    words = [word for word in SMALL if not word.startswith(("strategy", "model"))]
    command = [sys.executable, "-m", "launch.local", "nproc=4", "strategy=tp_pp", "model.num_layers=2", *words]
    training = [*command, "train.steps=4", "train.micro_batch_size=1"]
    done = subprocess.run(training, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    trained = open_trained(path)
    loss = validation_loss(trained.model(), trained.config, trained.corpus())
    assert loss == pytest.approx(json.loads((path / "summary.json").read_text())["validation/loss"], rel=1e-5)
    assert chat.main([str(path), "--prompt", "The", "--tokens", "6"]) == 0
    assert capsys.readouterr().out == shown(expected(path, "The", 6)) + "\n"


def test_characters_come_whole_and_control_nothing():
    text = "aé漢😀\n\tz"
    reader = ByteWords(256).reader()
    parts = [reader.read([byte]) for byte in text.encode()]
    assert "".join(parts) == text and [part for part in parts if part] == [*text]
    assert reader.read([*b"\x1b[2Ja\xff"], last=True) == "\ufffd[2Ja\ufffd"
    assert reader.read([0xE2, 0x80], last=True) == "\ufffd"
    assert ByteWords(256).encode("é\udcff") == [0xC3, 0xA9, 0xFF]
    with pytest.raises(BadInput, match="the prompt has byte 195, but the model knows the bytes below 128 only"):
        ByteWords(128).encode("é")


def test_nothing_of_the_text_to_stop_at_is_told():
    random.seed(1)
    for _ in range(500):
        stop = random.choices(b"ab", k=random.randint(1, 4))
        told, tokens, text, stopped = Told(ByteWords(256).reader(), stop), [], "", False
        for token in random.choices(b"ab", k=12):
            tokens.append(token)
            if stopped := tokens[-len(stop) :] == stop:
                break
            text += told.more(tokens)
        text += told.end(tokens, stopped=stopped)
        assert text == bytes(tokens[: len(tokens) - len(stop) * stopped]).decode()


def test_ids_of_an_unknown_tokenizer_are_numbers():
    config = cli.configured(["strategy=single", "data=tokens", "data.path=ids.bin", "model.vocab_size=300"])
    words = words_of(config)
    assert words.encode("7, 299 0") == [7, 299, 0]
    told = Told(words.reader(), words.encode("5 6"))
    assert [told.more([1]), told.more([1, 5]), told.more([1, 5, 7]), told.end([1, 5, 7, 5, 6], stopped=True)] == [
        "1", "", " 5 7", ""]  # fmt: skip
    for prompt, says in {
        "hello": "data.path=ids.bin holds token ids without their tokenizer, so the prompt must be numbers",
        "7 300": "the prompt has token id 300, but model.vocab_size=300: use ids below 300",
        "": "so the prompt must be numbers",
    }.items():
        with pytest.raises(BadInput, match=says):
            words.encode(prompt)
    assert isinstance(words_of(dataclasses.replace(config, data=cli.configured(["strategy=single"]).data)), ByteWords)
