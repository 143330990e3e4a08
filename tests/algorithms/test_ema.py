import pytest
import torch
from composer import Callback
from composer.algorithms import EMA
from composer.algorithms.ema.ema import EMAParameters, compute_ema
from composer.core import Event
from hypothesis import given
from hypothesis import strategies as st
from timm.utils import ModelEmaV2, ModelEmaV3
from tiny_run import Recorder, assert_equal, convnet
from torch.nn.parallel import DistributedDataParallel

from algorithms import bare_name, ema
from algorithms.config import EMAConfig
from algorithms.ema import in_batches

TIMES = {"100ba": "100ba", "2ep": "2ep", "0.003dur": "27ba", ".5dur": "4500ba", "0.00001dur": "1ba", "1dur": "9000ba"}


def test_a_share_of_the_run_becomes_batches():
    assert {time: in_batches(time, 9000) for time in TIMES} == TIMES


@given(share=st.floats(1e-3, 1), total=st.integers(1, 10**6), factor=st.integers(2, 10))
def test_half_lives_scale_with_the_run(share, total, factor):
    short, long = (int(in_batches(f"{share:.6f}dur", total * by).removesuffix("ba")) for by in (1, factor))
    assert short >= 1
    assert abs(long - factor * short) <= factor


@given(
    seed=st.integers(0, 2**31),
    smoothing=st.floats(1e-6, 1 - 1e-6),
    magnitude=st.sampled_from([1e-30, 1.0, 1e30]),
    updates=st.integers(1, 4),
)
def test_an_update_of_all_tensors_together_is_composers_bit_for_bit(seed, smoothing, magnitude, updates):
    torch.manual_seed(seed)
    network = convnet()
    theirs = EMAParameters(network)
    ours = {name: tensor.clone() for name, tensor in (theirs.named_parameters_dict | theirs.named_buffers_dict).items()}
    floats = [name for name in ours if ours[name].is_floating_point()]
    for _ in range(updates):
        values = network.state_dict()  # BatchNorm's counts of batches are its only whole numbers
        for tensor in values.values():
            tensor.copy_(torch.randn_like(tensor, dtype=torch.float32) * (magnitude if tensor.ndim else 1000))
        compute_ema(network, theirs, smoothing)
        for names in (floats, ours.keys() - floats):
            ema.average([ours[name] for name in names], [values[name] for name in names], smoothing)
    assert_equal(ours, theirs.named_parameters_dict | theirs.named_buffers_dict)


class Timms(Callback):
    """timm's averages of the same run, as its training script takes them: the first update copies the weights."""

    def __init__(self, decay, interval):
        self.decay, self.interval = decay, interval
        self.v2 = self.v3 = None

    def batch_end(self, state, logger):
        network, batch = state.model.module, int(state.timestamp.batch)
        if self.v2 is None:
            self.v2, self.v3 = ModelEmaV2(network, self.decay), ModelEmaV3(network, self.decay)
        if batch % self.interval == 0:
            self.v2.update(network)
            self.v3.update(network, step=1 + batch)  # its decay is zero before step 2


def bare(tensors):
    return {bare_name(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("fields", "decay", "interval"),
    [
        ({"half_life": "4ba"}, 2 ** (-1 / 4), 1),
        ({"half_life": "4ba", "update_interval": "2ba"}, 2 ** (-2 / 4), 2),
        ({"smoothing": 0.6}, 0.6, 1),
    ],
)
def test_the_average_is_composers_and_timms_and_only_evaluated(run, fields, decay, interval):
    timms, evaluated = Timms(decay, interval), Recorder("eval_batch_start")
    ours = run({"ema": fields}, callbacks=(timms, evaluated), evaluate=True)
    theirs = run([EMA(**{"half_life": None, "update_interval": "1ba"} | fields)], evaluate=True)
    final = ours.fit()
    theirs.fit()
    averages = [item.trainer.state.algorithms[0].ema_model for item in (ours, theirs)]
    average, composers = (bare(item.named_parameters_dict | item.named_buffers_dict) for item in averages)
    assert_equal(average, composers)
    assert_equal(average, bare(evaluated.values[-1]))
    floats = {name: tensor for name, tensor in average.items() if tensor.is_floating_point()}
    for original in (timms.v2.module.state_dict(), timms.v3.module.state_dict()):
        torch.testing.assert_close(floats, {name: original[name] for name in floats}, rtol=1e-6, atol=1e-6)
    # It is an average, the last weights are something else; and these are those of a run without.
    assert not torch.allclose(average["0.weight"], final["module.0.weight"], atol=1e-4)
    assert_equal(final, run({}, evaluate=True).fit())


@pytest.fixture
def one_process():
    """A process group of one, so that the model can be wrapped as it is among several."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("saved_wrapped", [False, True])
@pytest.mark.parametrize("resumed_wrapped", [False, True])
def test_averages_carry_over_from_any_world_size_to_any(one_process, state, logger, saved_wrapped, resumed_wrapped):
    def start(wrapped):
        made = state(convnet())
        names = set(dict(made.model.named_parameters()))
        made.model = DistributedDataParallel(made.model) if wrapped else made.model
        algorithm = ema.build(EMAConfig(half_life="4ba"), 100)
        algorithm.apply(Event.INIT, made, logger)
        return made, algorithm, names

    _, before, names = start(saved_wrapped)
    saved = before.state_dict()
    assert saved["ema_model"]["named_parameters_dict"].keys() == names
    run, after, _ = start(resumed_wrapped)
    after.load_state_dict(saved)
    averages = saved["ema_model"]["named_parameters_dict"] | saved["ema_model"]["named_buffers_dict"]
    averages = {name: tensor.clone() for name, tensor in bare(averages).items()}
    after.apply(Event.EVAL_START, run, logger)
    assert_equal(bare(run.model.state_dict()), averages)


def test_an_average_that_fits_nothing_is_an_error(state, logger):
    algorithm = ema.build(EMAConfig(half_life="4ba"), 100)
    algorithm.apply(Event.INIT, state(torch.nn.Linear(2, 2)), logger)
    with pytest.raises(ValueError, match="which the model lacks"):
        algorithm.apply(Event.FIT_START, state(torch.nn.Sequential(torch.nn.Linear(2, 2))), logger)
