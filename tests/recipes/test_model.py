import copy
import math

import pytest
import torch
import torchvision
from timm.loss import BinaryCrossEntropy
from torch import nn

from data.errors import InputError
from data.loader import IGNORED_LABEL
from recipes.config import LossConfig, RunConfig
from recipes.model import Classifier, build_classifier, build_network, checkpoint_activations


def build(name, classes, **settings):
    model = {"name": name} | settings.pop("model", {})
    least = {"run_name": "a", "device_batch_size": 8, "data": {"path": "x"}}
    config = RunConfig.model_validate(least | {"model": model} | settings)
    return build_classifier(config, classes, "cpu")


def test_initial_values_are_those_of_the_papers():
    original = torchvision.models.resnet50(zero_init_residual=True)
    ours = build("resnet50", 1000).module
    mine = ours.state_dict()
    assert all(torch.equal(theirs, mine[name]) for name, theirs in original.named_parameters() if "bn" in name)
    model = build("resnet18", 50, loss={"name": "binary_cross_entropy"})  # each class starts at its share
    assert torch.allclose(torch.sigmoid(model.module.fc.bias), torch.tensor(1 / 50), rtol=0.03)
    assert model.module.fc.bias[0].item() == pytest.approx(-math.log(50))


@pytest.mark.parametrize(("name", "near"), [("resnet51", "resnet50"), ("timm/resnet5O", "timm/resnet50"), ("a/b", "")])
def test_an_unknown_model_is_named_with_its_neighbours(name, near):
    with pytest.raises(InputError) as error:
        build_network(name, 10)
    assert error.value.lines[0].startswith("model.name: ")
    assert near in error.value.lines[0]


@pytest.mark.parametrize("soft", [False, True])
def test_losses_are_torchs(soft):
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    hot = nn.functional.one_hot(labels, 10).float()
    target = hot * 0.9 + 0.01 if soft else labels
    cross = Classifier(nn.Identity(), 10, LossConfig()).loss(logits, (logits, target))
    assert torch.allclose(cross, nn.functional.cross_entropy(logits, target))
    binary = Classifier(nn.Identity(), 10, LossConfig(name="binary_cross_entropy")).loss(logits, (logits, target))
    expected = nn.functional.binary_cross_entropy_with_logits(logits, target if soft else hot, reduction="sum") / 6
    assert torch.allclose(binary, expected)


def test_the_mean_of_binary_losses_is_timms():
    logits, target = torch.randn(6, 10), torch.rand(6, 10)
    for threshold in (None, 0.2):
        ours = LossConfig(name="binary_cross_entropy", mean_over_classes=True, target_threshold=threshold)
        theirs = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)
        loss = Classifier(nn.Identity(), 10, ours).loss(logits, (logits, target))
        assert torch.allclose(loss, theirs(logits, target.clone()))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_metrics_count_each_image_once_and_ignored_ones_never(classes):
    model = Classifier(nn.Identity(), classes, LossConfig())
    logits, labels = torch.randn(40, classes), torch.randint(classes, (40,))
    labels[::7] = IGNORED_LABEL
    metrics = model.get_metrics(is_train=False)
    for low, high in ((0, 13), (13, 14), (14, 40)):
        for metric in metrics.values():
            model.update_metric((logits[low:high], labels[low:high]), logits[low:high], metric)
    kept = labels != IGNORED_LABEL
    ranks = (logits[kept] > logits[kept].gather(1, labels[kept, None])).sum(1)
    assert metrics["top1"].compute().item() == pytest.approx((ranks < 1).float().mean().item())
    assert metrics["top5"].compute().item() == pytest.approx((ranks < 5).float().mean().item())
    expected = nn.functional.cross_entropy(logits[kept], labels[kept]).item()
    assert metrics["loss"].compute().item() == pytest.approx(expected, rel=1e-5)


def test_activation_checkpointing_changes_no_gradient_and_no_buffer():
    torch.manual_seed(0)
    plain = build_network("resnet18", 10)
    saving = copy.deepcopy(plain)
    assert checkpoint_activations(saving) == 8
    images = torch.randn(4, 3, 32, 32)
    counts = []
    for network in (plain, saving):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = network(images).square().mean()
        loss.backward()
        counts.append(sum(saved))
    for (name, one), (_, other) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6), name
    for (name, one), (_, other) in zip(plain.named_buffers(), saving.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    assert counts[1] < counts[0] / 3


@pytest.mark.parametrize(("name", "size", "weights"), [("googlenet", 32, [0.3, 0.3]), ("inception_v3", 299, [0.4])])
def test_auxiliary_classifiers_are_trained_with_torchvisions_weights(name, size, weights):
    model = build(name, 5).train()
    images, labels = torch.rand(2, 3, size, size), torch.tensor([1, 3])
    seen = []
    hook = model.module.register_forward_hook(lambda *args: seen.append(args[2]))
    outputs = model((images, labels))
    hook.remove()
    logits, *auxiliary = seen[0]
    losses = [nn.functional.cross_entropy(one, labels) for one in (logits, *auxiliary)]
    expected = sum(weight * loss for weight, loss in zip([1.0, *weights], losses, strict=True))
    assert torch.equal(outputs, logits)
    for _ in range(2):  # CutMix's interpolated loss asks twice
        assert model.loss(outputs, (images, labels)).item() == pytest.approx(expected.item(), rel=1e-6)
    # DDP finds in the output of forward what a step uses.
    assert all(one is not None for one in torch.autograd.grad(outputs.sum(), model.parameters(), allow_unused=True))
    copy.deepcopy(model)  # as SWA does, between two steps
    with torch.no_grad():
        assert model.eval()((images, labels)).shape == (2, 5)
        assert model.loss(torch.zeros(2, 5), (images, labels)).item() == pytest.approx(math.log(5))
