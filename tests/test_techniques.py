"""In a whole run: the loader's techniques and the seed change the weights, the number of workers does not.

Those that Composer runs are in algorithms/test_resume.py.
"""

import pytest

TINY = """
run_name: tiny
device: cpu
max_duration: 3ep
device_batch_size: 8
autoresume: false
model: {name: timm/test_resnet}
optimizer: {lr: 0.05}
data: {path: somewhere, train_size: 32, workers: 0}
eval: {sizes: [32], interval: 3}
checkpoints: {interval: 9ep}
loggers: {progress_bar: false, tensorboard: false}
algorithms:
"""
IN_THE_LOADER = [
    *("randaugment: {}", "augmix: {}", "colout: {batch: false}"),
    *("progressive_resizing: {size_increment: 8}", "fixres: {size: 40}"),
]


@pytest.fixture
def weights(train, tmp_path):
    """The fingerprint of a tiny run with the given `algorithms` lines and overrides."""

    def weights(*lines, **options):
        overrides = [f"{key.replace('__', '.')}={value}" for key, value in options.items()]
        path, number = tmp_path / "tiny.yaml", sum(1 for _ in tmp_path.iterdir())
        path.write_text(TINY.rstrip("\n") + f" {{{', '.join(lines)}}}\n")
        status, summary = train(path, f"run_name=run{number}", *overrides)
        assert status == 0
        return summary["weights_sha256"]

    return weights


def test_each_technique_of_the_loader_changes_the_run(weights):
    assert len({weights(), *(weights(line) for line in IN_THE_LOADER)}) == 1 + len(IN_THE_LOADER)


def test_off_on_the_command_line_equals_a_removed_line_and_the_seed_changes_the_run(weights):
    without = weights("label_smoothing: {}")
    assert weights("label_smoothing: {}", "mixup: {}", algorithms__mixup="off") == without
    assert weights("label_smoothing: {}", seed=3) != without


def test_the_number_of_workers_changes_nothing(weights):
    lines = ["randaugment: {}", "mixup: {}", "cutmix: {}", "ema: {half_life: 3ba}", "fixres: {size: 40}"]
    assert weights(*lines, data__workers=0) == weights(*lines, data__workers=3)
