"""The loader: which checkpoint, which weights, which architecture, and what is refused."""

import hashlib
import json
import os
import pickle
import resource
import shutil

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from composer import Trainer

from algorithms.build import build_algorithms
from algorithms.config import AlgorithmsConfig
from data.errors import InputError
from recipes.checkpoints.format import pack
from recipes.checkpoints.manifest import Manifest, load_manifest
from recipes.checkpoints.store import LocalStore
from recipes.config import LossConfig
from recipes.model import Classifier, build_network, for_inference, operated_network
from recipes.run import create_run_folder
from recipes.trained import Summary, load_trained
from recipes.watch.summary import weights_sha256
from tests.recipes.checkpoints.tiny import content_of, plant

NEWEST = "ep003-ba000009"


def load(run, checkpoint=None, weights=None, folder=None, **keys):
    """As the commands load it; `folder` is another checkpoints.folder."""
    checkpoints = run.config.checkpoints.model_copy(update={"folder": str(folder or run.folder / "checkpoints")})
    return load_trained(run.config.model_copy(update={"checkpoints": checkpoints, **keys}), checkpoint, weights)


def is_refused(words, *arguments, **keys):
    """The loader raises one line that matches `words`."""
    with pytest.raises(InputError, match=words) as refused:
        load(*arguments, **keys)
    assert len(refused.value.lines) == 1
    assert "\n" not in refused.value.lines[0]


def fingerprint(trained):
    digest = weights_sha256(trained.network.state_dict())
    assert digest == trained.weights_sha256
    return digest


@pytest.fixture
def copied(tiny, tmp_path):
    """A copy of the run's checkpoints, to be damaged."""
    return shutil.copytree(tiny.folder / "checkpoints", tmp_path / "checkpoints")


def damage(folder, stem):
    path = folder / f"{stem}.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("plant", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_a_run_does_not_write_through_what_lies_in_its_files_places(tiny, tmp_path, plant):
    for name in ("config.yaml", "log.txt", "metrics.jsonl", "summary.json"):
        (tmp_path / name).mkdir()
        plant(tmp_path / name / name)
        with pytest.raises(InputError, match=f"{name}: not a regular file") as refused:
            create_run_folder(tiny.config, tmp_path / name)
        assert len(refused.value.lines) == 1


def test_a_run_folder_that_cannot_be_written_is_one_line(tiny, tmp_path):
    (tmp_path / ".config.yaml.new").mkdir()  # in the place of the temporary file
    with pytest.raises(InputError, match=f"^{tmp_path}: cannot be written: "):
        create_run_folder(tiny.config, tmp_path)


def test_the_average_is_what_the_run_ended_with(tiny, tmp_path):
    average, raw = load(tiny), load(tiny, weights="raw")
    assert (average.weights, raw.weights) == ("ema", "raw")
    assert fingerprint(average) == tiny.summary["weights_sha256"] != fingerprint(raw)
    assert fingerprint(load(tiny, weights="ema")) == fingerprint(average)
    # The figures in summary.json are of the average, and only its.
    assert average.summary.model_dump() == {name: tiny.summary[name] for name in Summary.model_fields}
    assert raw.summary is None
    assert average.classes == ("class0", "class1", "class2")
    assert average.config.data.mean == (0.4, 0.4, 0.4)
    assert not average.network.training
    bucket = {"folder": "s3://bucket/runs/tiny", "runs_folder": str(tmp_path)}
    found = load(tiny, **bucket)
    assert found.location.startswith("s3://bucket/runs/tiny/ep003")
    assert fingerprint(found) == fingerprint(average)
    assert found.summary == average.summary
    named = load(tiny, "s3://bucket/runs/tiny/ep001-ba000003.safetensors", **bucket)
    assert (named.manifest.epoch, named.summary) == (1, None)
    assert list(tmp_path.iterdir()) == []  # nothing stays behind


def test_a_damaged_checkpoint_is_skipped_with_a_message(tiny, copied, capsys):
    damage(copied, NEWEST)
    found = load(tiny, folder=copied)
    assert found.manifest.stem == "ep002-ba000006"
    (line,) = capsys.readouterr().err.splitlines()
    assert NEWEST in line
    assert "SHA-256" in line
    is_refused(rf"--checkpoint: .*{NEWEST}: its SHA-256", tiny, str(copied / f"{NEWEST}.safetensors"))
    for stem in ("ep001-ba000003", "ep002-ba000006"):
        damage(copied, stem)
    with pytest.raises(InputError, match="no good checkpoint of run 'tiny'"):
        load(tiny, folder=copied)


def evil(place):
    """An object whose unpickling makes the folder `place`."""

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(place),)

    return Code()


def test_a_checkpoint_that_holds_code_is_refused_and_does_not_run(tiny, copied, tmp_path):
    path = copied / f"{NEWEST}.safetensors"
    torch.save({"state": {"model": evil(tmp_path / "it ran")}}, path, pickle_module=pickle)
    note = json.loads((copied / f"{NEWEST}.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    note["manifest"]["files"][0] |= {"size": path.stat().st_size, "sha256": digest}
    text = json.dumps(note["manifest"], sort_keys=True, separators=(",", ":"))
    note["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (copied / f"{NEWEST}.json").write_text(json.dumps(note))
    is_refused("is not a checkpoint", tiny, str(path))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("outputs", [10**7, 2**70])
def test_a_config_that_asks_for_a_network_beyond_the_memory_is_refused_before_it_is_built(tiny, copied, outputs):
    before, store = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, LocalStore(copied)
    manifest = json.loads(load_manifest(store, NEWEST).to_json())["manifest"]
    manifest["config"]["model"].update(num_classes=outputs)
    store.put(f"{NEWEST}.json", Manifest.model_validate(manifest).to_json())
    is_refused(rf"{NEWEST}.*do not fit", tiny, str(copied / f"{NEWEST}.safetensors"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("averages", [{"x": 3}, {"x": {5: torch.ones(1)}}, {"x": {"y": "z"}}])
def test_an_average_that_is_none_is_refused_in_a_line(tiny, copied, averages):
    content = content_of(copied, NEWEST)
    next(item for _, item in content["state"]["algorithms"] if "ema_model" in item)["ema_model"] = averages
    plant(copied, NEWEST, pack(content))
    is_refused(rf"{NEWEST}.*its moving average is malformed", tiny, str(copied / f"{NEWEST}.safetensors"))


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.write_text("[" * 100_000)], ids=["pipe", "deep"])
def test_what_lies_in_the_place_of_a_summary_does_no_harm(tiny, copied, plant):
    plant(copied.parent / "summary.json")
    assert load(tiny, folder=copied, runs_folder="nowhere").summary is None


@pytest.mark.parametrize(
    ("folder", "checkpoint", "words"),
    [
        ("nowhere", None, "nowhere: no checkpoint of run 'tiny'; train it"),
        ("nowhere", "nowhere/ep001-ba000003.json", "--checkpoint: nowhere/ep001-ba000003.json does not exist"),
        ("nowhere", "README.md", "README.md: cannot be loaded as weights only"),
        ("nowhere", "s3://bucket/empty", "--checkpoint: s3://bucket/empty holds no complete checkpoint"),
        ("nowhere", "s3://nobucket/x", "bucket does not exist"),
        ("s3://bucket/runs/none", None, "and s3://bucket/runs/none: no checkpoint of run 'tiny'"),
    ],
)
def test_a_missing_checkpoint_is_one_line(tiny, tmp_path, folder, checkpoint, words):
    is_refused(words, tiny, checkpoint, folder=folder, runs_folder=str(tmp_path))


def test_another_runs_checkpoints_are_not_taken_for_this_ones(tiny):
    is_refused(r"of run 'tiny', not of 'other'.*--checkpoint", tiny, run_name="other")


CHANGES = {
    "after": "{blurpool: {blur_first: false, min_channels: 1}}",
    "weight_standardization": "{composer: {WeightStandardization: {}}}",
    "factorize": "{composer: {Factorize: {}}}",
    "ghost_batchnorm": "{composer: {GhostBatchNorm: {}}}",
    "all": "{blurpool: {}, squeeze_excite: {}, ema: {half_life: 3ba}, fixres: {}, sam: {}, mixup: {}}",
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_architecture_is_that_of_the_trainer(name):
    algorithms = AlgorithmsConfig.model_validate(yaml.safe_load(CHANGES[name]))
    model = Classifier(build_network("resnet18", 3), 3, LossConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model=model, optimizers=optimizer, algorithms=build_algorithms(algorithms, 10, 5), python_log_level=None
    )
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    # Statistics of real activations: with those of an untrained network the logits grow to 1e18, all of it rounding.
    for module in trainer.state.model.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 1.0
    with torch.no_grad():
        trainer.state.model.module.train()(images)
    expected = {key.removeprefix("module."): value for key, value in trainer.state.get_model_state_dict().items()}
    trainer.close()
    network = operated_network("resnet18", 3, algorithms)
    shapes = ({key: value.shape for key, value in state.items()} for state in (network.state_dict(), expected))
    assert next(shapes) == next(shapes)
    network.load_state_dict(expected)
    with torch.no_grad():
        logits = trainer.state.model.module.eval()(images)
        assert torch.equal(network(images), logits)
        for_inference(network)
        torch.testing.assert_close(network(images[:1]), logits[:1], rtol=1e-4, atol=1e-5)


def test_stochastic_depth_folds_into_a_plain_network():
    algorithms = AlgorithmsConfig.model_validate({"stochastic_depth": {"drop_rate": 0.5}})
    network = operated_network("resnet50", 3, algorithms)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain = torchvision.models.resnet50(num_classes=3).eval()
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        before = network(images)
        assert not torch.allclose(plain(images), before, rtol=1e-2)
        for_inference(network)
        plain.load_state_dict(network.state_dict())
        torch.testing.assert_close(network(images), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain(images), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wrap", "techniques"),
    [
        ("resnet.pth", lambda tensors: tensors, {}),
        # The names are not those of the YAML's network, but those of the plain one.
        ("checkpoint.pt", lambda tensors: {"model": tensors, "epoch": 90}, {"blurpool": {}}),
        ("model_best.pth.tar", lambda tensors: {"state_dict": {f"module.{key}": tensors[key] for key in tensors}}, {}),
        ("pytorch_model.bin", lambda tensors: tensors, {}),
        ("model.safetensors", lambda tensors: tensors, {}),
    ],
)
def test_another_projects_weights_load_into_the_network_of_the_yaml(tiny, tmp_path, name, wrap, techniques):
    network, path = build_network("timm/test_resnet", 3).eval(), str(tmp_path / name)
    (safetensors.torch.save_file if name.endswith(".safetensors") else torch.save)(wrap(network.state_dict()), path)
    found = load(tiny, path, algorithms=AlgorithmsConfig(**techniques))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.network(images), network(images))
    assert (found.num_classes, found.classes, found.location) == (3, (), path)


class Allowed:
    pass


def test_code_in_another_projects_file_is_refused_and_does_not_run(tiny, tmp_path):
    torch.save({"x": evil(tmp_path / "it ran")}, tmp_path / "evil.pt", pickle_module=pickle)
    is_refused(r"evil\.pt: cannot be loaded as weights only", tiny, str(tmp_path / "evil.pt"))
    assert not (tmp_path / "it ran").exists()
    torch.save({"x": Allowed()}, tmp_path / "other.pt", pickle_module=pickle)
    torch.serialization.add_safe_globals([Allowed])  # as some library may have done
    is_refused(r"other\.pt: cannot be loaded as weights only", tiny, str(tmp_path / "other.pt"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "is not a state dict of tensors"),
        ([torch.zeros(1)], "is not a state dict of tensors"),
        ({"state_dict": {"x": 1}}, "is not a state dict of tensors"),
        ({"x": torch.zeros(3)}, "holds no linear layer"),
        ({"fc.weight": torch.zeros(3, 3)}, "its weights do not fit timm/test_resnet: Missing key"),
    ],
)
def test_weights_of_another_network_are_refused_in_a_line(tiny, tmp_path, content, words):
    torch.save(content, tmp_path / "x.pth")
    is_refused(words, tiny, str(tmp_path / "x.pth"))


def test_a_file_that_is_none_is_refused_in_a_line(tiny, tmp_path):
    for name, data in (("a.pt", b""), ("b.pth", b"x" * 100), ("c.safetensors", b"x" * 100), ("d.bin", b"PK\3\4")):
        (tmp_path / name).write_bytes(data)
        is_refused(f"{name}: cannot be loaded as weights only", tiny, str(tmp_path / name))
