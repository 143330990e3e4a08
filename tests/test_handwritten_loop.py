"""The program against a training loop in plain PyTorch, written here from the papers' and torch's own parts.

Rounding alone parts two such loops in the end: after ten steps or so a value on the other side of a ReLU's or a pooling
layer's edge turns a difference of 1e-7 into one of 1e-5, which training then amplifies. So the first test takes torch's
functions, whose rounding is their own, and steps small enough that no loss depends on it (strong weight decay makes up
for what they hide of the optimizer); the second takes the recipe's rates, and rounds where the program does.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.transforms import v2

from algorithms.mix import is_cutmix
from data.open import open_split_pair
from data.sampler import PositionSampler, epoch_order
from recipes.load import load_config
from recipes.schedule import epoch_plan
from recipes.trainer import build_train_data
from tests.support import ROOT, one_thread, write_images

SEED, EPOCHS, BATCH, CLASSES, STEPS = 5, 7, 8, 3, 21
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = """
run_name: run
model: {name: resnet50}
optimizer: {lr: 0.000005, weight_decay: 50.0}
data: {path: IMAGES, train_size: 32, augment: {area: [1.0, 1.0], aspect_ratio: [1.0, 1.0], flip: 0.0}}
eval: {sizes: [32], crop_ratio: 1.0}
algorithms: {label_smoothing: {smoothing: 0.1}}
"""
HERE = (
    f"seed={SEED}",
    f"max_duration={EPOCHS}ep",
    f"device_batch_size={BATCH}",
    "device=cpu",
    "data.workers=0",
    "eval.interval=7",
    "checkpoints.interval=7ep",
    "loggers.interval=1",
    "loggers.tensorboard=false",
    "loggers.progress_bar=false",
)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture
def program(train, tmp_path):
    """Run a YAML with the program: its losses, rates and sizes step by step, and its summary."""

    def program(path, *overrides):
        status, summary = train(path, *HERE, *overrides)
        assert status == 0
        lines = (tmp_path / summary["run_name"] / "metrics.jsonl").read_text().splitlines()
        steps = [entry for entry in map(json.loads, lines) if "train/loss" in entry]
        assert [entry["batch"] for entry in steps] == list(range(1, STEPS + 1))
        names = ("loss", "lr", "momentum", "image_size")
        return SimpleNamespace(summary=summary, **{name: [entry[f"train/{name}"] for entry in steps] for name in names})

    return program


def resnet50():
    """torchvision's with its zero-initialised residual branches, from the run's seed."""
    torch.manual_seed(SEED)
    return torchvision.models.resnet50(num_classes=CLASSES, zero_init_residual=True)


def by_hand(network, batches, loss_of, *, lr, weight_decay, after_step=lambda: None):
    """SGD with Nesterov momentum and One-Cycle over STEPS batches: losses, rates and momenta."""
    decayed = [weight for weight in network.parameters() if weight.ndim > 1]
    exempt = [weight for weight in network.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    schedule = OneCycleLR(
        optimizer, lr, STEPS, pct_start=0.3, div_factor=25, final_div_factor=1e4, base_momentum=0.85, max_momentum=0.95
    )
    losses, rates, momenta = [], [], []
    network.train()
    for step, (images, labels) in enumerate(batches):
        loss = loss_of(step, images, labels)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        rates.append(optimizer.param_groups[1]["lr"])
        momenta.append(optimizer.param_groups[1]["momentum"])
        optimizer.step()
        after_step()
        if step + 1 < STEPS:
            schedule.step()
    return losses, rates, momenta


def require_same(ours, theirs, network, val, size):
    """Step by step, and in the last evaluation, of a network on pictures with labels."""
    losses, rates, momenta = theirs
    assert ours.loss == pytest.approx(losses, rel=1e-5)
    assert ours.lr == pytest.approx(rates, rel=1e-9)
    assert ours.momentum == pytest.approx(momenta, rel=1e-9)
    pictures, labels = map(list, zip(*val, strict=True))
    with torch.no_grad():
        logits = network.eval()(torch.stack(pictures))
    found = ours.summary["eval_by_size"][size]
    assert found["top1"] == pytest.approx((logits.argmax(1) == torch.tensor(labels)).float().mean().item(), abs=1e-6)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-3)


def test_twenty_steps_of_resnet50_have_the_losses_of_a_plain_loop(program, tmp_path):
    """Decoded with Pillow, normalised with torchvision: of our loader it takes the order of the images alone."""
    images = write_images(tmp_path / "images", size=32)
    for path in images.rglob("*.jpg"):  # square pictures without loss: neither cropping nor decoding changes a pixel
        with Image.open(path) as picture:
            picture.crop((0, 0, 32, 32)).save(path.with_suffix(".png"))
        path.unlink()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(PLAIN.replace("IMAGES", str(images)))
    ours = program(recipe, f"data.path={images}")

    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    train, val = (torchvision.datasets.ImageFolder(images / split, transform) for split in ("train", "val"))

    def batches():
        for epoch in range(EPOCHS):
            for indices in np.split(epoch_order(len(train), SEED, epoch), len(train) // BATCH):
                pictures, labels = zip(*(train[index] for index in indices), strict=True)
                yield torch.stack(pictures), torch.tensor(labels)

    network = resnet50()

    def loss_of(step, images, labels):
        return F.cross_entropy(network(images), labels, label_smoothing=0.1)

    theirs = by_hand(network, batches(), loss_of, lr=5e-6, weight_decay=50.0)
    assert max(theirs[0]) - min(theirs[0]) > 0.1  # they do move
    require_same(ours, theirs, network, val, "32")


class Blur(nn.Module):
    """The 3x3 binomial filter of Zhang 2019, section 4, then subsampling."""

    def __init__(self, channels, stride):
        super().__init__()
        self.stride = stride
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filter", torch.outer(line, line).repeat(channels, 1, 1, 1))

    def forward(self, images):
        return F.conv2d(images, self.filter, stride=self.stride, padding=1, groups=len(self.filter))


def blurred(network):
    """A blur before each strided convolution but the stem's, and within the pooling layer, which sees 64 channels."""
    for name, layer in network.named_children():
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) and layer.in_channels >= 16:
            setattr(network, name, nn.Sequential(Blur(layer.in_channels, 1), layer))
        elif isinstance(layer, nn.MaxPool2d):
            setattr(network, name, nn.Sequential(nn.MaxPool2d(3, 1, 1), Blur(64, 2)))
        else:
            blurred(layer)
    return network


def mixed(step, images, targets):
    """MixUp (Zhang et al. 2018, section 2) or CutMix (Yun et al. 2019, section 3.1), drawn as the program draws."""
    draws, size = np.random.default_rng((SEED, 0, step, 0)), images.shape[2]  # of rank 0 and microbatch 0
    if not is_cutmix(SEED, step, 0.5):
        share = draws.beta(0.2, 0.2)
        share, others = min(share, 1 - share), draws.permutation(len(images))
        return [whole.lerp(whole[others], share) for whole in (images, targets)]
    side = int(size * np.sqrt(1 - draws.beta(1.0, 1.0)))
    middles, others = (draws.integers(size), draws.integers(size)), draws.permutation(len(images))
    rows, columns = (slice(max(0, middle - side // 2), min(size, middle + side // 2)) for middle in middles)
    images = images.clone()
    images[:, :, rows, columns] = images[others, :, rows, columns]
    share = (rows.stop - rows.start) * (columns.stop - columns.start) / size**2
    return images, targets.lerp(targets[others], share)


def test_the_whole_recipe_has_the_losses_of_a_plain_loop(program, images):
    """yamls/medium.yaml as it is, at small sizes. Of ours the loop takes the loader's batches and the seeds."""
    path = ROOT / "yamls" / "medium.yaml"
    overrides = ("run_name=run", "data.train_size=48", "algorithms.fixres.size=56", "eval.sizes=[48, 56]")
    ours = program(path, *overrides)
    assert ours.image_size == [32] * 3 + [48] * 15 + [56] * 3

    config = load_config(path, [*HERE, *overrides, f"data.path={images}"])
    source, _ = open_split_pair(config.data.path, config.data.cache_folder)
    sampler = PositionSampler(len(source), epoch_plan(config, 1), SEED, 0, 1)
    loader = build_train_data(config, source, sampler, "cpu").dataloader
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))

    def batches():
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            yield from loader

    network = blurred(resnet50()).to(memory_format=torch.channels_last)
    averages = []

    def loss_of(step, images, labels):
        images = (images.float() - mean) * (1 / std)
        smooth = F.one_hot(labels, CLASSES) * (1 - 0.1) + 0.1 / CLASSES  # mixed labels smoothed would be the same
        images, targets = mixed(step, images, smooth)
        logits = network(images.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits, targets)

    def average():
        averages[:] = averages or [ModelEmaV3(network, decay=0.5)]  # a half-life of 0.2 % of 21 steps is one step
        averages[0].update(network)

    theirs = by_hand(network, batches(), loss_of, lr=2.0 * BATCH / 2048, weight_decay=5e-5, after_step=average)
    transform = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms(crop_size=56, resize_size=64)
    val = torchvision.datasets.ImageFolder(images / "val", transform)
    require_same(ours, theirs, averages[0].module, val, "56")
