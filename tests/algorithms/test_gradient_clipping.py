import pytest
import timm.utils.agc
import torch
from composer.core import Event
from tiny_run import convnet

from algorithms import gradient_clipping
from algorithms.config import GradientClippingConfig

ORIGINALS = {
    "norm": torch.nn.utils.clip_grad_norm_,
    "value": torch.nn.utils.clip_grad_value_,
    "adaptive": lambda params, bound: timm.utils.agc.adaptive_clip_grad(params, bound, eps=0.0),
}


@pytest.mark.parametrize("kind", ORIGINALS)
def test_the_gradients_match_the_originals(kind, state, logger):
    gradients = []
    for clip in ("ours", "theirs", None):
        torch.manual_seed(2)
        run = state(convnet())
        for param in run.model.parameters():
            if param.ndim == 1:
                param.data.normal_()
            param.grad = torch.randn_like(param)
        if clip == "ours":
            algorithm = gradient_clipping.build(GradientClippingConfig(type=kind, threshold=0.05))
            assert algorithm.match(Event.AFTER_TRAIN_BATCH, run)
            algorithm.apply(Event.AFTER_TRAIN_BATCH, run, logger)
        elif clip == "theirs":
            ORIGINALS[kind](run.model.parameters(), 0.05)
        # timm and Composer differ on vectors: unit by unit, or as one; weights are what the paper is about.
        gradients.append([param.grad for param in run.model.parameters() if param.ndim > 1 or kind != "adaptive"])
    ours, theirs, unclipped = gradients
    torch.testing.assert_close(ours, theirs)
    assert all((mine.abs() <= free.abs()).all() for mine, free in zip(ours, unclipped, strict=True))
    assert not torch.equal(ours[0], unclipped[0])
