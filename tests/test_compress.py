"""scripts/compress.py on a small trained run: what is written, how it is opened, and what is refused."""

import json
import pickle
import shutil

import pytest
import torch
import yaml

from scripts import compress
from scripts.compressing import words
from scripts.compressing.methods.layers import linear_layers
from scripts.compressing.methods.schemes import SCHEMES, torchao_config
from scripts.compressing.opened import open_compressed
from scripts.compressing.packed import CODES, SCALES
from scripts.compressing.record import COMPRESSION, WEIGHTS, Record
from train.checkpoint.whole.trained import open_trained, validation_loss

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
# what torchao and bitsandbytes say when they are imported, or compute on this machine's CPU
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.timeout(200),
]
TOKENS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))


def main(*argv, code=0):
    """Run the tool in this process."""
    if code == 0:
        assert compress.main([*map(str, argv)]) == 0
    else:
        with pytest.raises(SystemExit) as ended:
            compress.main([*map(str, argv)])
        assert ended.value.code == code


@pytest.fixture(scope="module")
def compressed(finished, tmp_path_factory):
    """The directory of a compressed run by its method; each is made once."""
    folder, made = tmp_path_factory.mktemp("compressed"), {}

    def of(method):
        if method not in made:
            made[method] = folder / method
            main(finished, f"method={method}", f"out={made[method]}", "tokens=4")
        return made[method]

    return of


@pytest.fixture
def copied(compressed, tmp_path):
    """A compressed run whose files a test may change."""
    return shutil.copytree(compressed("8da4w"), tmp_path / "copy")


@pytest.mark.parametrize("method", SCHEMES)
def test_a_quantised_model_is_stored_small_and_opened_to_the_bit(method, finished, compressed):
    path = compressed(method)
    trained, opened, record = open_trained(finished), open_compressed(path), Record.read(path)
    model, stored = opened.model(), opened.stored()
    here = trained.model()
    names = [*linear_layers(here)]
    SCHEMES[method].apply(here, names)
    assert torch.equal(model(TOKENS), here(TOKENS)), "what is read is what the package computes"
    assert not torch.equal(model(TOKENS), trained.model()(TOKENS)), "nothing was quantised"

    original, weights = trained.tensors(), opened.tensors()
    assert weights.keys() == original.keys()
    for name, weight in weights.items():
        if name in names:
            four = method in ("int4_weight_only", "8da4w", "nf4")
            assert stored[name + CODES].nbytes == weight.numel() // (2 if four else 1)
            assert stored[name + SCALES].numel() == (weight.numel() // 32 if four else weight.shape[0])
            apart = (weight - original[name]).abs().max() / original[name].abs().max()
            assert 0 < apart < (0.2 if four else 0.01)
        else:
            assert torch.equal(weight, original[name]), "embedding and norms stay as they are"

    assert record.after.loss == pytest.approx(validation_loss(model, opened.config, opened.corpus()), rel=1e-6)
    assert record.before.loss == pytest.approx(
        validation_loss(trained.model(), opened.config, opened.corpus()), rel=1e-6
    )
    assert record.after.bytes == (path / WEIGHTS).stat().st_size
    assert record.after.bytes < (0.30 if four else 0.36) * record.before.bytes  # much of this model is its embedding
    assert record.parent["sha256"] == trained.sha256 and record.tokens == 32
    assert all(speed > 0 for side in (record.before, record.after) for speed in vars(side).values())


def test_torchao_itself_computes_the_same(finished, compressed):
    """The product's own way through files against torchao's one call, without anything of this program."""
    from torchao.quantization import quantize_

    model = open_trained(finished).model()
    quantize_(model, torchao_config("8da4w"))
    assert torch.equal(open_compressed(compressed("8da4w")).model()(TOKENS), model(TOKENS))


def test_the_memory_is_that_of_codes_and_scales(compressed):
    """torchao keeps a 4-bit weight in a byte, and bitsandbytes two in one."""
    parent = Record.read(compressed("nf4")).before.resident_bytes
    embedding = 256 * 128 * 4
    held = {method: Record.read(compressed(method)).after.resident_bytes - embedding for method in ("8da4w", "nf4")}
    small = parent - embedding
    assert small / 4 < held["8da4w"] < small / 4 + small / 20 * 2 and small / 8 < held["nf4"] < small / 6


@pytest.mark.parametrize("method", ["8da4w", "nf4", "llm_int8"])
def test_chat_answers_with_a_compressed_model(method, compressed, capsys):
    from scripts import chat

    words = [str(compressed(method)), "--prompt", "The for ", "--tokens", "5", "--json", "runtime.device=cpu"]
    assert chat.main(words) == 0
    said = json.loads(capsys.readouterr().out)
    opened = open_compressed(compressed(method))
    assert len(said["tokens"]) == 5 and said["method"] == method and said["sha256"] == opened.sha256
    if method == "nf4":  # the others round activations, where the last bit may decide
        tokens, model = [*b"The for "], opened.model()
        for _ in range(5):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert said["tokens"] == tokens[8:]


@pytest.mark.slow
def test_a_head_that_is_the_embedding_stays_as_it_is(tmp_path):
    from tests.saved_runs import train

    run = train(tmp_path, "train.steps=2", "model.tie_embeddings=true")
    assert run.returncode == 0, run.stderr
    (path,) = (tmp_path / "runs").iterdir()
    main(path, "method=int8_weight_only", "tokens=2")
    opened = open_compressed(tmp_path / "runs" / f"{path.name}-int8_weight_only")
    model = opened.model()
    assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")
    assert f"head.weight{CODES}" not in opened.stored()
    assert yaml.safe_load((opened.folder / "config.yaml").read_text())["model"]["tie_embeddings"] is True


def test_a_pruned_model_is_stored_without_its_zeros(finished, tmp_path, capsys):
    main(finished, "method=prune_2_4", "score=wanda", "calibration=4", f"out={tmp_path / 'p'}", "tokens=2", "--json")
    said = json.loads(capsys.readouterr().out)
    opened = open_compressed(tmp_path / "p")
    weight = opened.model().get_parameter("layers.0.feed_forward.down.weight")
    assert (weight.eq(0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    assert said["options"] == {"score": "wanda", "calibration": 4}
    assert said["after"]["bytes"] < 0.7 * said["before"]["bytes"]
    assert said["after"]["resident_bytes"] == said["before"]["resident_bytes"], "zeros are kept in memory"


class _Bomb:
    def __reduce__(self):
        return (print, ("the pickle was read",))


@pytest.mark.parametrize("damage, said", [
    (lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100]), "has another SHA-256"),
    (lambda path: (path / WEIGHTS).write_bytes(pickle.dumps(_Bomb())), "has another SHA-256"),
    (lambda path: (path / WEIGHTS).unlink(), "cannot be read"),
    (lambda path: (path / COMPRESSION).write_text('{"format": 1'), "is not valid JSON"),
    (lambda path: (path / COMPRESSION).write_bytes(pickle.dumps(_Bomb())), "is not UTF-8|is not valid JSON"),
])  # fmt: skip
def test_a_damaged_compressed_run_gets_one_message(copied, damage, said, capsys):
    damage(copied)
    main(copied, "method=int8_weight_only", code=2)
    out, err = capsys.readouterr()
    assert out == "" and "the pickle was read" not in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("change, said", [
    (lambda stored: stored.pop("norm.weight"), "norm.weight is missing"),
    (lambda stored: stored.update({f"head.weight{SCALES}": torch.zeros(3, 3)}), "is no torch.float32"),
    (lambda stored: stored.pop(f"head.weight{SCALES}"), "has no weights of this model"),
    (lambda stored: stored.update(other=torch.zeros(1)), "does not have the weights of this model"),
])  # fmt: skip
def test_a_file_of_another_model_is_refused(copied, change, said):
    """Its hash is right, as somebody who makes a file can write it too."""
    from safetensors.torch import save_file

    from scripts.compressing.record import sha256_of
    from train.config.problems import BadInput

    stored = open_compressed(copied).stored()
    change(stored)
    save_file(stored, copied / WEIGHTS)
    values = json.loads((copied / COMPRESSION).read_text())
    (copied / COMPRESSION).write_text(json.dumps(values | {"weights_sha256": sha256_of(copied / WEIGHTS)}))
    with pytest.raises(BadInput, match=said):
        open_compressed(copied).model()


@pytest.mark.parametrize("argv, said", [
    (["method=int3"], "method=int3 is not known: use one of int8_weight_only"),
    (["method=int8_weight"], "use method=int8_weight_only"),
    ([], "no method is given"),
    (["method=nf4", "score=wanda"], "score is not read by method=nf4"),
    (["method=nf4", "optim.lr=1e-3"], "optim.lr=1e-3 is about a training, but method=nf4 trains nothing"),
    (["method=prune_2_4", "nproc=2"], "use retrain=500, for example"),
    (["method=prune_2_4", "score=magnitude", "calibration=3"], "calibration is not read with score=magnitude"),
    (["method=prune_unstructured", "sparsity=1.5"], "sparsity must be a number between 0 and 1"),
    (["method=qat_8da4w"], "method=qat_8da4w trains, but no steps are given"),
    (["method=prune_2_4", "retrain=3", "train.steps=5"], "train.steps is set by the tool: use retrain=STEPS"),
    (["method=prune_2_4", "retrain=3", "optim.lrr=5"], "optim.lrr"),
    (["method=distil", "retrain=3"], "a student of half the layers, but model.num_layers=1"),
    (["method=nf4", "device=tpu"], "device must be cpu or cuda"),
    (["nf4"], "nf4 is no word of this tool"),
])  # fmt: skip
def test_a_wrong_command_line_gets_one_message_and_makes_nothing(run, argv, said, capsys):
    before = sorted(run.parent.iterdir())
    main(run, *argv, code=2)
    out, err = capsys.readouterr()
    assert said in err and len(err.strip().splitlines()) == 1 and out == ""
    assert sorted(run.parent.iterdir()) == before


@pytest.mark.parametrize("path, said", [("nowhere", "no such folder"), ("empty", "has no checkpoint")])
def test_a_folder_without_a_trained_model_is_refused(tmp_path, path, said, capsys):
    (tmp_path / "empty").mkdir()
    main(tmp_path / path, "method=nf4", code=2)
    assert said in capsys.readouterr().err


def test_what_is_done_is_not_done_again_nor_twice(copied, finished, capsys):
    main(finished, "method=8da4w", f"out={copied}", code=2)
    assert "exists already" in capsys.readouterr().err
    main(copied, "method=nf4", code=2)
    assert "cannot begin with" in capsys.readouterr().err


def test_a_command_line_is_written_as_it_was_read(finished):
    typed = ["method=prune_2_4", "score=wanda", "calibration=8", "retrain=5", "nproc=2", "device=cpu", "strategy=dp"]
    task = words.read(str(finished), typed)
    assert words.read(str(finished), words.words_of(task)[1:]) == task
