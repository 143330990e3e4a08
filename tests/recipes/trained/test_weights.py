"""A run that starts from weights: whose logits it has at first, what is new, what is refused, and that it resumes."""

import re
import shutil

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from composer.algorithms.blurpool import apply_blurpool

from algorithms.config import AlgorithmsConfig
from data.errors import InputError
from recipes.config import ModelConfig
from recipes.load import load_config
from recipes.model import build_network, operated_network, sync_batchnorm
from recipes.trained import load_trained
from recipes.watch.summary import weights_sha256
from recipes.weights import Start, fill, read_start
from tests.recipes.trained.conftest import RECIPE
from tests.support import run_here, summary_of, write_images

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NAMES = {"timm": "timm/test_resnet", "torchvision": "resnet18"}


def network_of(name, classes=3, seed=1):
    """A network whose every tensor differs from those of a new one, statistics included."""
    torch.manual_seed(seed)
    network = build_network(name, classes)
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 32, 32))
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.rand_like(parameter))
    return network.eval()


def logits(network):
    with torch.no_grad():
        return network.eval()(IMAGES)


def started(tiny, source, name="timm/test_resnet", classes=("a", "b", "c"), algorithms=None, **model):
    """A network after surgery, filled as a run's would be, and what was said."""
    model = ModelConfig(name=name, weights=str(source), **model)
    start = read_start(tiny.config.model_copy(update={"model": model}))
    network = operated_network(name, len(classes), AlgorithmsConfig.model_validate(algorithms or {}))
    return network, fill(network, start, model, classes)


def saved(network, path):
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    return path


def cache_for_timm(network, name, folder, monkeypatch):
    """Make this the network's pretrained weights in timm's cache, as if they had been downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = folder / f"models--{timm.get_pretrained_cfg(name).hf_hub_id.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    saved(network, place / "snapshots" / ("0" * 40) / "model.safetensors")


@pytest.mark.parametrize("blurpool", [False, True], ids=["plain", "blurpool"])
@pytest.mark.parametrize("library", NAMES)
def test_a_file_gives_its_networks_logits(tiny, tmp_path, library, blurpool):
    name = NAMES[library]
    source = network_of(name)
    path = saved(source, tmp_path / ("weights.safetensors" if library == "timm" else "weights.pth"))
    network, said = started(tiny, path, name, algorithms={"blurpool": {}} if blurpool else {})
    if blurpool:
        blurred(source)
        assert ["has no BlurPool and this network has" in line for line in said] == [True]
    else:
        assert said == []
    torch.testing.assert_close(logits(network), logits(source))
    # The other way round: the weights of the network with BlurPool, in one with and in one without.
    path = saved(network, tmp_path / "changed.pth")
    assert torch.equal(
        logits(started(tiny, path, name, algorithms={"blurpool": {}})[0]), logits(blurred(network_of(name)))
    )
    assert torch.equal(logits(started(tiny, path, name)[0]), logits(network_of(name)))


def blurred(network):
    apply_blurpool(network)
    return network


@pytest.mark.parametrize("where", ["folder", "checkpoints", "file", "bucket"])
def test_a_run_gives_the_logits_of_its_average(tiny, where):
    source = {
        "folder": tiny.folder,
        "checkpoints": tiny.folder / "checkpoints",
        "file": tiny.folder / "checkpoints" / "ep003-ba000009.safetensors",
        "bucket": "s3://bucket/runs/tiny",
    }[where]
    trained = load_trained(tiny.config)
    network, said = started(tiny, source, classes=trained.classes)
    assert said == []
    assert torch.equal(logits(network), logits(trained.network))
    assert weights_sha256(network.state_dict()) == tiny.summary["weights_sha256"]


def test_a_file_in_a_bucket(tiny, tmp_path, server):
    source = network_of("timm/test_resnet")
    data = saved(source, tmp_path / "x.safetensors").read_bytes()
    server.client().put_object(Bucket="bucket", Key="weights/x.safetensors", Body=data)
    network, _ = started(tiny, "s3://bucket/weights/x.safetensors")
    assert torch.equal(logits(network), logits(source))
    trained = load_trained(tiny.config, "s3://bucket/weights/x.safetensors")  # as evaluate and the others do
    assert torch.equal(logits(trained.network), logits(source))


def test_the_libraries_own_weights(tiny, tmp_path, monkeypatch):
    """From their caches, since tests download nothing."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source, name = network_of("resnet18", 1000), torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    saved(source, tmp_path / "hub" / "checkpoints" / name)
    for model in ("resnet18", "timm/resnet18"):  # the same names of tensors
        network, _ = started(tiny, "torchvision", model, classes=range(1000))
        torch.testing.assert_close(logits(network), logits(source))
    source = network_of("timm/test_resnet", 1000)
    cache_for_timm(source, "test_resnet", tmp_path, monkeypatch)
    network, _ = started(tiny, "timm", classes=range(1000))
    assert torch.equal(logits(network), logits(source))
    for library, model in (("timm", "timm/resnet10t"), ("timm", "googlenet"), ("torchvision", "timm/resnet10t")):
        with pytest.raises(InputError, match=f"model.weights: {library}'s weights of .* cannot be loaded"):
            started(tiny, library, model)


@pytest.mark.parametrize("name", ["googlenet", "squeezenet1_0", "timm/test_vit", "timm/test_resnet"])
def test_another_number_of_classes_gives_a_new_classifier_and_says_so(tiny, tmp_path, name):
    path = saved(build_network(name, 7), tmp_path / "x.pth")
    torch.manual_seed(5)
    network, said = started(tiny, path, name)
    assert said == [f"model.weights: a new classifier for 3 classes, not the 7 of {path}"]
    tensors = torch.load(path)
    differ = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, tensors[key])}
    assert differ == {key for key in tensors if tensors[key].shape[:1] == (7,)}


def test_a_run_with_other_classes_gives_a_new_classifier(tiny):
    network, said = started(tiny, tiny.folder)
    (line,) = said
    assert "a new classifier, since" in line
    assert "trained on other classes" in line
    trained, own = load_trained(tiny.config).network.state_dict(), network.state_dict()
    assert {key for key in own if not torch.equal(own[key], trained[key])} == {"fc.weight", "fc.bias"}


def test_synchronised_batchnorm_fits():
    source, network = network_of("resnet18"), sync_batchnorm(build_network("resnet18", 3), "cpu")
    assert fill(network, Start("x.pth", source.state_dict(), ""), ModelConfig(name="resnet18"), "abc") == []
    assert torch.equal(logits(network), logits(source))


def test_layers_that_a_technique_adds_are_missing_in_plain_weights_only():
    def changed(**techniques):
        return operated_network("resnet18", 3, AlgorithmsConfig.model_validate(techniques))

    source, model, loose = network_of("resnet18"), ModelConfig(), ModelConfig(weights_strict=False)
    start, network = Start("x.pth", source.state_dict(), ""), changed(blurpool={}, squeeze_excite={})
    with pytest.raises(InputError, match=r"does not fit resnet50.*weights_strict=false") as refused:
        fill(network, start, model, "abc")
    assert any("only in resnet50: layer2.0.conv2.se." in line for line in refused.value.lines)
    assert any("layer2.0.conv2.se." in line for line in fill(network, start, loose, "abc"))
    start = Start("y.pth", network.state_dict(), "")
    assert torch.equal(start.tensors["layer3.0.conv1.conv.conv.weight"], source.layer3[0].conv1.weight)
    without = changed(squeeze_excite={})
    (line,) = fill(without, start, model, "abc")
    assert "has BlurPool and this network has not" in line
    apply_blurpool(without)
    torch.testing.assert_close(logits(without), logits(network))


def test_what_does_not_fit_is_listed_and_refused_unless_told_otherwise(tiny, tmp_path):
    source = network_of("timm/test_resnet")
    tensors = source.state_dict()
    tensors["more"] = torch.zeros(3)
    tensors["conv1.0.weight"] = torch.zeros(1, 3, 3, 3)
    del tensors["layer1.0.bn1.weight"], tensors["bn1.num_batches_tracked"]
    torch.save(tensors, tmp_path / "x.pth")
    listed = ["(1, 3, 3, 3), here", "1 only in timm/test_resnet: layer1.0.bn1.weight", "1 only in the weights: more"]
    with pytest.raises(InputError) as refused:
        started(tiny, tmp_path / "x.pth")
    first, *others = refused.value.lines
    assert "x.pth does not fit timm/test_resnet; allowed: " in first
    assert all(words in line for words, line in zip(listed, others, strict=True))
    network, said = started(tiny, tmp_path / "x.pth", weights_strict=False)
    assert all(words in line for words, line in zip(listed, said[1:], strict=True))
    assert torch.equal(network.layer2[0].conv1.weight, source.layer2[0].conv1.weight)


@pytest.fixture
def recipe(tiny, tmp_path):
    """The tiny run's recipe with BlurPool and a folder for checkpoints, one epoch shorter than it was."""
    images = write_images(tmp_path / "images", classes=4, train=6, seed=3)
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("IMAGES", str(images)).replace("s3://bucket/runs/{run_name}", f"{tmp_path}/{{run_name}}")
    path.write_text(text.replace("ema:", "blurpool: {min_channels: 1}, ema:") + f"runs_folder: {tmp_path}\n")
    return path


def test_a_run_starts_from_weights_and_resumes_without_them(tiny, recipe, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(tiny.folder, source)
    command = (recipe, f"model.weights={source}", "max_duration=2ep", "run_name=new")
    assert run_here(*command) == 0
    printed = capsys.readouterr().out
    assert f"starting from {source}/checkpoints/ep003-ba000009.safetensors" in printed
    assert "a new classifier for 4 classes, not the 3 of" in printed
    whole = summary_of(tmp_path, "new")
    digest = tiny.summary["weights_sha256"]
    assert whole["started_from"] == {"source": str(source), "sha256": digest}
    assert load_config(tmp_path / "new" / "config.yaml").model.weights_sha256 == digest
    # The same command again, without its last epoch and without the weights.
    for file in (tmp_path / "new").glob("ep002*"):
        file.unlink()
    (tmp_path / "new" / "summary.json").unlink()
    shutil.move(source, tmp_path / "away")
    assert run_here(*command) == 0
    again = summary_of(tmp_path, "new")
    assert "ep001" in again["resumed_from"][0]
    assert "starting from" not in capsys.readouterr().out
    for key in ("weights_sha256", "config_digest", "started_from"):
        assert again[key] == whole[key]
    # Other weights are another recipe; so are none.
    for words, key in ((["model.weights=other"], "model.weights: "), (["model.weights=null"], "model.weights: ")):
        with pytest.raises(InputError, match="made by another recipe") as refused:
            run_here(*command, *words)
        assert any(key in line for line in refused.value.lines)
    with pytest.raises(InputError, match=rf"model.weights_sha256: now \"{'0' * 64}\", in the checkpoint \"{digest}\""):
        run_here(*command, f"model.weights_sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("none.pth", "model.weights: none.pth does not exist; allowed: .pt, .pth"),
        ("torchvison", "model.weights: torchvison does not exist; allowed: .pt, .pth"),
        ("README.md", "README.md: cannot be loaded as weights only"),
        ("tests", "model.weights: tests holds no complete checkpoint"),
        ("TMP/other.pth", "other.pth does not fit timm/test_resnet; allowed: weights of this network; tensors"),
        (
            "TMP/more.pth",
            "more.pth does not fit timm/test_resnet; allowed: weights of this network, or model.weights_st",
        ),
        ("TMP/list.pth", "list.pth: is not a state dict of tensors"),
        ("TMP/sparse.pth", "sparse.pth: is not a state dict of tensors"),
        (
            "TMP/good.pth model.weights_sha256=" + "0" * 64,
            "model.weights_sha256: .*good.pth has [0-9a-f]{64}, not 0",
        ),
        ("s3://bucket/none.pth", "s3://bucket/none.pth: not found"),
        ("s3://bucket/none", "model.weights: s3://bucket/none holds no complete checkpoint"),
        ("s3://nobucket/none.pth", "s3://nobucket/none.pth: "),
        ("s3://nobucket/none", "s3://nobucket/none: the bucket does not exist"),
    ],
)
def test_weights_that_cannot_be_used_end_the_command_with_status_2(recipe, tmp_path, command, weights, words):
    tensors = network_of("timm/test_resnet", 4).state_dict()
    files = {"good": tensors, "more": tensors | {"x": torch.zeros(1)}, "other": {"y": torch.zeros(1)}, "list": [1]}
    for name, content in (files | {"sparse": {"x": torch.eye(2).to_sparse()}}).items():
        torch.save(content, tmp_path / f"{name}.pth")
    status, _, error = command("train", recipe, *f"model.weights={weights}".replace("TMP", str(tmp_path)).split())
    assert status == 2
    assert "Traceback" not in error
    assert re.search(words, error), error
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()
