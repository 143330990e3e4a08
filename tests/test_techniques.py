"""In a whole run: each technique, taken away or added, changes the weights, and the loader's workers change nothing."""

import pytest

from algorithms.config import AlgorithmsConfig

TINY = """
run_name: tiny
device: cpu
max_duration: 3ep
device_batch_size: 8
autoresume: false
model: {name: resnet18}
optimizer: {lr: 0.05}
data: {path: somewhere, train_size: 32, workers: 0}
eval: {sizes: [32], interval: 3}
checkpoints: {interval: 9ep}
loggers: {progress_bar: false, tensorboard: false}
algorithms:
"""
ADDED = {
    "blurpool": "{}",
    "squeeze_excite": "{min_channels: 16}",
    "stochastic_depth": "{target_layer_name: ResNetBottleneck, drop_rate: 0.5}",
    "channels_last": "{}",
    "randaugment": "{}",
    "augmix": "{}",
    "colout": "{}",
    "progressive_resizing": "{size_increment: 8}",
    "fixres": "{size: 40}",
    "mixup": "{}",
    "cutmix": "{}",
    "label_smoothing": "{}",
    "gradient_clipping": "{threshold: 0.1}",
    "ema": "{half_life: 3ba}",
    "swa": "{start: 0.3, end: 0.9}",
    "sam": "{interval: 2}",
    "composer": "{CutOut: {length: 0.5}}",
}
MODELS = {"stochastic_depth": "resnet50"}
"""What needs another model than resnet18."""


@pytest.fixture
def weights(train, tmp_path):
    """The fingerprint of a tiny run with the given `algorithms` lines and overrides."""

    def weights(*lines, **options):
        overrides = [f"{key.replace('__', '.')}={value}" for key, value in options.items()]
        path = tmp_path / "tiny.yaml"
        path.write_text(TINY.rstrip("\n") + (" {}\n" if not lines else "\n" + "".join(f"  {x}\n" for x in lines)))
        number = sum(1 for _ in tmp_path.iterdir())
        status, summary = train(path, f"run_name=run{number}", *overrides)
        assert status == 0
        return summary["weights_sha256"]

    return weights


def test_the_table_covers_every_technique():
    assert set(ADDED) == set(AlgorithmsConfig.model_fields)


@pytest.fixture(scope="module")
def plain():
    """The fingerprint of the run without techniques, once for all tests."""
    return {}


@pytest.mark.parametrize("name", sorted(ADDED))
def test_a_technique_changes_the_run(name, weights, plain):
    model = MODELS.get(name, "resnet18")
    if model not in plain:
        plain[model] = weights(model__name=model)
    assert weights(f"{name}: {ADDED[name]}", model__name=model) != plain[model]


def test_off_on_the_command_line_is_a_line_removed(weights):
    lines = ["label_smoothing: {}", "mixup: {}"]
    assert weights(*lines, algorithms__mixup="off") == weights("label_smoothing: {}")


def test_the_number_of_workers_changes_nothing(weights):
    lines = ["randaugment: {}", "mixup: {}", "cutmix: {}", "ema: {half_life: 3ba}", "fixres: {size: 40}"]
    assert weights(*lines, data__workers=0) == weights(*lines, data__workers=3)


def test_the_seed_changes_the_run_and_two_equal_runs_are_equal(weights):
    first = weights("mixup: {}")
    assert weights("mixup: {}") == first
    assert weights("mixup: {}", seed=3) != first
