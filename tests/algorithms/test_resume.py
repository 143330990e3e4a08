"""Every technique that Composer runs changes a run, and a run with it resumes bit for bit."""

import pytest
import torch
from tiny_run import assert_equal, bottlenecks, convnet

from algorithms.blurpool import BlurPool
from algorithms.composer_library import NOT_RESUMABLE, USABLE
from algorithms.config import AlgorithmsConfig

ARGUMENTS = {
    "Factorize": {"min_channels": 8, "min_features": 4, "latent_features": 2},
    "GhostBatchNorm": {"ghost_batch_size": 4},
    "GyroDropout": {"sigma": 8, "tau": 4},
}
SAME = {"channels_last", "LowPrecisionGroupNorm", "LowPrecisionLayerNorm"}
"""What leaves this run as it is, up to rounding."""
BLOCKS = {"network": bottlenecks}
CASES = [
    ("blurpool", {}, [7], {}),
    ("squeeze_excite", {"min_channels": 16, "latent_channels": 0.25}, [7], {}),
    ("stochastic_depth", {"drop_rate": 0.6}, [1, 4, 7, 10], BLOCKS),
    ("stochastic_depth", {"drop_rate": 0.6, "drop_warmup": 0.5}, [1, 4, 7, 10], BLOCKS),
    ("stochastic_depth", {"drop_rate": 0.6, "stochastic_method": "sample"}, [1, 4, 7, 10], BLOCKS),
    ("stochastic_depth", {"drop_rate": 1.0, "drop_distribution": "uniform"}, [2], BLOCKS),  # blocks never trained
    *(("composer", {name: ARGUMENTS.get(name, {})}, [7], {}) for name in USABLE if name not in NOT_RESUMABLE),
    ("channels_last", {}, [7], {}),
    ("colout", {}, [7], {}),
    ("progressive_resizing", {"where": "batch"}, [7], {}),
    ("fixres", {"start": 0.34, "train": "classifier"}, [3, 5, 8, 10], {}),  # the stage is epochs 1 and 2 of 3
    ("fixres", {"start": 0, "train": "classifier"}, [8], {}),
    ("mixup", {"alpha": 0.4}, [7], {}),
    ("cutmix", {}, [7], {}),
    ("label_smoothing", {}, [7], {}),
    *(("gradient_clipping", {"type": kind, "threshold": 0.01}, [7], {}) for kind in ("norm", "value", "adaptive")),
    ("ema", {"half_life": "4ba", "update_interval": "2ba", "start": 0.2}, [2, 7, 10], {}),
    ("swa", {"start": 0.3, "end": 0.7}, [4, 5, 7, 10, 15, 17], {"epochs": 4}),
    ("swa", {"start": 0.3, "end": 0.7, "update_interval": "2ba"}, [4, 5, 7, 10, 15, 17], {"epochs": 4}),
    ("sam", {"interval": 3, "rho": 0.5}, [1, 5, 7, 8], {}),
    ("sam", {"interval": 3, "rho": 0.5}, [1, 5, 7, 8], {"momentum": 0.0}),
]


@pytest.fixture(scope="module")
def plain():
    """The final weights of runs without techniques, by their options."""
    return {}


@pytest.mark.parametrize(("name", "fields", "batches", "options"), CASES)
def test_it_changes_the_run_and_resumes_bit_for_bit(name, fields, batches, options, resumed, run, plain):
    through, others = resumed({name: fields}, batches, **options)
    key = str(options)
    if key not in plain:
        plain[key] = run({}, **options).fit()
    weights, before = through.weights(), plain[key]
    if name == "ema":  # the trained weights stay; the average is what must carry over
        assert_equal(weights, before)
        averages = [item.trainer.state.algorithms[0].ema_model.named_parameters_dict for item in (through, *others)]
        for average in averages[1:]:
            assert_equal(averages[0], average)
    elif SAME & {name, *fields}:
        for tensor in before:
            torch.testing.assert_close(weights[tensor], before[tensor], rtol=1e-3, atol=1e-4)
    else:
        assert weights.keys() != before.keys() or any(not torch.equal(weights[it], before[it]) for it in before)


def test_both_mixes_and_label_smoothing_resume_together(resumed):
    resumed({"mixup": {"alpha": 0.4}, "cutmix": {}, "label_smoothing": {}}, [7])


def test_a_resumed_run_has_its_own_algorithms_and_no_other(run, tmp_path):
    through = run({"blurpool": {}}, save={7: tmp_path / "saved.pt"})
    through.fit()
    resumed = run({"blurpool": {}}, load=tmp_path / "saved.pt")
    assert [type(item.trainer.state.algorithms[0]) for item in (through, resumed)] == [BlurPool, BlurPool]
    assert len(resumed.trainer.state.algorithms) == 1  # Composer would add its own class of this name


@pytest.mark.parametrize("name", NOT_RESUMABLE)
def test_what_is_declared_not_resumable_does_not_resume(name, run, tmp_path):
    chosen = {"composer": {name: ARGUMENTS.get(name, {})}}
    assert AlgorithmsConfig.model_validate(chosen).not_resumable == {f"composer.{name}": NOT_RESUMABLE[name]}
    through = run(chosen, save={7: tmp_path / "saved.pt"}).fit()
    with pytest.raises(AssertionError):
        assert_equal(through, run(chosen, load=tmp_path / "saved.pt").fit())


def test_every_technique_is_here():
    elsewhere = {"randaugment", "augmix", "distillation"}  # in the loader, or with a teacher: test_distillation.py
    assert {name for name, *_ in CASES} | elsewhere == set(AlgorithmsConfig.model_fields)


def test_the_weights_stay_in_nhwc_order(run):
    final = run({"channels_last": {}, "blurpool": {}, "squeeze_excite": {"min_channels": 16}}).fit()
    kernels = [tensor for tensor in final.values() if tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.shape[2] > 1]
    assert kernels
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in kernels)
    assert not convnet()[0].weight.is_contiguous(memory_format=torch.channels_last)
