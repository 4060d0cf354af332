"""A checkpoint of any strategy becomes one model in one process."""

import pytest
import torch
import yaml

from tests.saved_runs import newest, train
from train.checkpoint.whole.trained import empty_model, fill, open_trained, validation_loss
from train.config.problems import BadInput


def test_the_loss_of_a_trained_model_is_the_loss_that_its_run_has_logged(run):
    trained = open_trained(run)
    model = trained.model()
    assert trained.manifest.step == 4 and len(trained.sha256) == 64
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    loss = validation_loss(model, trained.config, trained.corpus())
    summary = yaml.safe_load((run / "summary.json").read_text())
    assert loss == pytest.approx(summary["validation/loss"], rel=1e-6)
    fill(model, trained.tensors() | {"norm.weight": torch.zeros(trained.config.model.dim)}, "here")
    assert validation_loss(model, trained.config, trained.corpus()) != loss


@pytest.mark.timeout(100)
@pytest.mark.parametrize("more", [["model.tie_embeddings=true"], ["model=moe_tiny"]], ids=["tied", "mixture"])
def test_shared_weights_and_buffers_are_read_too(tmp_path, more):
    assert train(tmp_path, "train.steps=2", *more).returncode == 0
    (path,) = (tmp_path / "runs").iterdir()
    trained = open_trained(path)
    model = trained.model()
    tied = "head.weight" not in dict(model.named_parameters())
    assert tied == trained.config.model.tie_embeddings
    summary = yaml.safe_load((path / "summary.json").read_text())
    loss = validation_loss(model, trained.config, trained.corpus())
    assert loss == pytest.approx(summary["validation/loss"], rel=1e-6)


def test_other_weights_and_another_text_are_refused(run):
    trained = open_trained(newest(run))
    tensors = trained.tensors()
    for wrong in (tensors | {"extra": torch.ones(1)}, {**tensors, "norm.weight": torch.ones(3)}):
        with pytest.raises(BadInput, match="does not have the weights of this model"):
            fill(empty_model(trained.config), wrong, "here")
    trained.manifest.work["data"]["corpus_sha256"] = "0" * 64
    with pytest.raises(BadInput, match="is another text than"):
        trained.corpus()
