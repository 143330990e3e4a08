"""What `find_resume` decides, and EMA's averages across world sizes."""

import shutil

import pytest
import torch
from composer.algorithms import EMA
from torch.nn.parallel import DistributedDataParallel

from recipes.checkpoints.places import Places
from recipes.checkpoints.world_size import fit_averages, without_wrapper
from recipes.errors import InputError
from tests.recipes.checkpoints.tiny import Tiny, damage, identity, same


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tiny = Tiny(tmp_path_factory.mktemp("saved"))
    tiny.go(tiny.interrupt_at(7))
    return tiny


def test_autoresume_off_starts_from_zero(saved, tmp_path, untouched):
    shutil.copytree(saved.places.local, tmp_path / "checkpoints")
    tiny = Tiny(tmp_path)
    weights = tiny.go(autoresume=False)
    assert tiny.resume.load_path is None
    assert same(weights, untouched)


def test_autoresume_off_does_not_mix_two_recipes_in_a_folder(saved):
    other = Tiny(saved.places.run_folder)
    other.identity = identity(lr=0.2)
    with pytest.raises(InputError, match="another recipe"):
        other.find(autoresume=False)


@pytest.mark.parametrize(
    "form", ["{0}", "{0}/checkpoints", "{0}/checkpoints/{1}.safetensors", "{0}/checkpoints/{1}.json"]
)
def test_a_named_checkpoint_of_another_run_is_taken(saved, tmp_path, untouched, form):
    tiny = Tiny(tmp_path)
    tiny.identity = identity("branch")
    weights = tiny.go(resume=form.format(saved.places.run_folder, "ep001-ba000006"))
    assert tiny.resume.manifest.batch == (6 if form.endswith(("safetensors", "json")) else 7)
    assert same(weights, untouched)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{0}/checkpoints/ep009-ba000099.safetensors", "does not exist"),
        ("{0}/none", "does not exist"),
        ("{0}/checkpoints/notes.txt", "is not a checkpoint"),
        ("{0}/empty", "holds no complete checkpoint"),
        ("{0}/checkpoints/ep001-ba000006.safetensors", "instead of"),
    ],
)
def test_a_named_checkpoint_that_cannot_be_used_is_refused(saved, tmp_path, path, message):
    shutil.copytree(saved.places.local, tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    damage(tmp_path / "checkpoints" / "ep001-ba000006.safetensors", "0.5")
    with pytest.raises(InputError, match=message):
        Tiny(tmp_path / "run").find(resume=path.format(tmp_path))


def test_a_named_checkpoint_of_another_recipe_is_refused(saved, tmp_path):
    tiny = Tiny(tmp_path)
    tiny.identity = identity(lr=0.3)
    with pytest.raises(InputError, match=r"optimizer.lr: now 0.3, in the checkpoint 0.1"):
        tiny.find(resume=str(saved.places.local))


def test_places(tmp_path):
    assert Places.of("elsewhere/x", str(tmp_path.parent), tmp_path.name).remote is None
    remote = Places.of("s3://bucket/x/", str(tmp_path.parent), tmp_path.name)
    assert (remote.local, remote.remote) == (tmp_path / "checkpoints", "s3://bucket/x")


@pytest.fixture
def one_process():
    """A process group of one, so that the model can be wrapped as it is among several."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Holder:
    """As much of a State as has names."""

    def __init__(self, model, algorithm):
        self.model, self.algorithms = model, [algorithm]


@pytest.mark.parametrize("saved_wrapped", [False, True])
@pytest.mark.parametrize("resumed_wrapped", [False, True])
def test_averages_carry_over_from_any_world_size_to_any(one_process, saved_wrapped, resumed_wrapped):
    from composer.algorithms.ema.ema import EMAParameters

    def model(wrapped):
        torch.manual_seed(0)
        inner = torch.nn.Module()
        inner.module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        return DistributedDataParallel(inner) if wrapped else inner

    before, after = EMA(half_life="4ba"), EMA(half_life="4ba")
    before.ema_model, before.ema_started = EMAParameters(model(saved_wrapped)), True
    for tensor in before.ema_model.named_parameters_dict.values():
        tensor.add_(1.0)
    kept = without_wrapper({"algorithms": [("EMA", before.state_dict())], "model": {}})
    names = dict(kept["algorithms"])["EMA"]["ema_model"]["named_parameters_dict"].keys()
    assert names == dict(model(False).named_parameters()).keys()
    after.load_state_dict(dict(kept["algorithms"])["EMA"])
    resumed = model(resumed_wrapped)
    fit_averages(Holder(resumed, after))
    assert after.ema_model.named_parameters_dict.keys() == dict(resumed.named_parameters()).keys()
    assert after.ema_model.named_buffers_dict.keys() == dict(resumed.named_buffers()).keys()
    after.ema_model.transfer_ema_params(resumed)
    for name, tensor in resumed.named_parameters():
        assert torch.equal(tensor, dict(model(resumed_wrapped).named_parameters())[name] + 1.0)


def test_an_average_that_fits_nothing_is_an_error():
    from composer.algorithms.ema.ema import EMAParameters

    algorithm = EMA(half_life="4ba")
    algorithm.ema_model, algorithm.ema_started = EMAParameters(torch.nn.Linear(2, 2)), True
    with pytest.raises(ValueError, match="lacks"):
        fit_averages(Holder(torch.nn.Sequential(torch.nn.Linear(2, 2)), algorithm))
