import subprocess
import sys

import pytest
from pydantic import ValidationError

from algorithms.build import build_algorithms, build_image_transforms
from algorithms.config import AlgorithmsConfig

ALL = {
    "blurpool": {},
    "squeeze_excite": {},
    "stochastic_depth": {},
    "composer": {"CutOut": {"length": 0.3}},
    "channels_last": {},
    "randaugment": {},
    "augmix": {},
    "colout": {},
    "progressive_resizing": {"where": "batch"},
    "mixup": {},
    "cutmix": {},
    "label_smoothing": {},
    "gradient_clipping": {"threshold": 1.0},
    "ema": {"half_life": "0.1dur"},
    "sam": {},
}


def errors(config):
    with pytest.raises(ValidationError) as caught:
        AlgorithmsConfig.model_validate(config)
    return [line for item in caught.value.errors() for line in str(item["ctx"]["error"]).splitlines()]


BUILT = """
BlurPool CheckedSqueezeExcite ResumableStochasticDepth CutOut ChannelsLast ColOut ProgressiveResizing Mix
GradientClipping PortableEMA SAM
"""


def test_techniques_run_in_the_order_of_the_fields():
    config = AlgorithmsConfig.model_validate(ALL)
    assert list(ALL) == [name for name in AlgorithmsConfig.model_fields if name in ALL]
    assert [type(item).__name__ for item in build_algorithms(config, total_batches=1000, epochs=10)] == BUILT.split()
    transforms = [type(item).__name__ for item in build_image_transforms(config)]
    assert transforms == ["RandAugmentTransform", "AugmentAndMixTransform"]


def test_all_broken_rules_are_reported_at_once():
    chosen = {
        "mixup": {"interpolate_loss": True},
        "cutmix": {},
        "label_smoothing": {},
        "ema": {"smoothing": 0.9},
        "swa": {},
        "fixres": {"train": "classifier", "start": 0.9},
        "colout": {},
        "progressive_resizing": {"where": "batch", "finetune_fraction": 0.05},
    }
    lines = errors(chosen)
    keys = ["mixup.interpolate_loss", "cutmix.interpolate_loss", "swa", "swa", "colout.batch"]
    assert [line.split(":")[0] for line in lines] == [*keys, "progressive_resizing.finetune_fraction"]
    assert "at least 0.1," in lines[-1]


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"ema": {}}, "exactly one"),
        ({"ema": {"half_life": "10ba", "smoothing": 0.9}}, "exactly one"),
        ({"ema": {"half_life": "2ep", "update_interval": "5ba"}}, "both in epochs"),
        ({"blurpool": {"replace_convs": False, "replace_maxpools": False}}, "nothing would change"),
        ({"colout": {"p_row": 0, "p_col": 0}}, "nothing would change"),
        ({"progressive_resizing": {"delay_fraction": 0.6, "finetune_fraction": 0.5}}, "must not exceed 1"),
        ({"progressive_resizing": {"mode": "crop"}}, "where: batch"),
        ({"stochastic_depth": {"stochastic_method": "sample", "drop_warmup": 0.1}}, "block"),
        ({"swa": {"start": 0.9, "end": 0.5}}, "before end"),
    ],
)
def test_fields_of_one_technique_must_agree(config, word):
    (line,) = errors(config)
    assert word in line


WRONG = {
    "mixup": {"alpha": 0},
    "cutmix": {"switch_prob": 1.5},
    "label_smoothing": {"smoothing": 0},
    "gradient_clipping": {"threshold": -1},
    "sam": {"rho": 0, "interval": 0},
    "fixres": {"start": 1.1},
    "progressive_resizing": {"initial_scale": 1.0},
    "randaugment": {"severity": 11},
    "augmix": {"depth": 0},
    "ema": {"half_life": "0dur", "update_interval": "10 batches"},
    "stochastic_depth": {"target_layer_name": "Bottleneck"},
}


def test_values_out_of_range_are_refused():
    with pytest.raises(ValidationError) as caught:
        AlgorithmsConfig.model_validate(WRONG)
    refused = {item["loc"][:2] for item in caught.value.errors()}
    assert refused == {(technique, field) for technique, fields in WRONG.items() for field in fields}


def test_reading_a_config_imports_neither_torch_nor_composer():
    code = (
        "import sys; from algorithms.config import AlgorithmsConfig as C;"
        "C.model_validate({'mixup': {}, 'fixres': {}, 'composer': {'CutOut': {}}});"
        "sys.exit(bool({'torch', 'composer', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
