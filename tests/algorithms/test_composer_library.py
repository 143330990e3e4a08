import inspect
from typing import get_args

import composer.algorithms
import pytest
from composer.core import Algorithm

from algorithms.composer_library import NOT_RESUMABLE, OWN_KEY, UNSUITABLE, USABLE, build_library, problems
from algorithms.config import AlgorithmsConfig

CLASSES = {
    name: item
    for name, item in vars(composer.algorithms).items()
    if inspect.isclass(item) and issubclass(item, Algorithm)
}


def test_every_algorithm_of_composer_is_classified():
    assert sorted(CLASSES) == sorted([*OWN_KEY, *UNSUITABLE, *USABLE])
    assert USABLE.keys() >= NOT_RESUMABLE.keys()
    assert set(OWN_KEY.values()) <= AlgorithmsConfig.model_fields.keys()


@pytest.mark.parametrize("name", USABLE)
def test_the_arguments_are_composers(name):
    """Their names in order, and the parts of their types that YAML can express; all have defaults."""
    made = CLASSES[name].__init__
    known = inspect.signature(made, eval_str=True).parameters.values()
    expected = [] if made is Algorithm.__init__ else list(known)[1:]
    assert list(USABLE[name]) == [argument.name for argument in expected]
    for argument in expected:
        ours, theirs = USABLE[name][argument.name], argument.annotation
        writable = {int, float, bool, str} & set(get_args(theirs) or [theirs])
        assert set(get_args(ours) or [ours]) == (writable or {None})
        assert argument.default is not inspect.Parameter.empty


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"BlurPool": {}}, [("BlurPool", "has its own key; write algorithms.blurpool")]),
        ({"SAM": {}}, [("SAM", "has its own key; write algorithms.sam")]),
        ({"Alibi": {}}, [("Alibi", "language models")]),
        ({"Cutout": {}}, [("Cutout", "did you mean CutOut?")]),
        ({"blur_pool": {}}, [("blur_pool", "did you mean BlurPool?")]),
        ({"CutOut": {"num_hole": 1}}, [("CutOut.num_hole", "did you mean num_holes?")]),
        ({"CutOut": {"num_holes": "2"}}, [("CutOut.num_holes", "got '2'; allowed: int")]),
        ({"CutOut": {"length": True}}, [("CutOut.length", "got True; allowed: float")]),
        ({"CutOut": {"input_key": [0]}}, [("CutOut.input_key", "got [0]; allowed: str or int")]),
        ({"LowPrecisionLayerNorm": {"apply_at": "init"}}, [("LowPrecisionLayerNorm.apply_at", "cannot be written")]),
        (
            {"GhostBatchNorm": {"size": 8}, "Nonsense": {}},
            [("GhostBatchNorm.size", "allowed: ghost_batch_size"), ("Nonsense", "allowed: CutOut, Factorize")],
        ),
        ({"CutOut": {"num_holes": 2, "length": 1}}, []),  # an integer may stand for a float
    ],
)
def test_a_wrong_choice_is_reported_with_what_is_allowed(chosen, expected):
    found = list(problems(chosen))
    assert [key for key, _ in found] == [key for key, _ in expected]
    assert all(word in text for (_, text), (_, word) in zip(found, expected, strict=True))


def test_a_value_that_composer_refuses_is_reported():
    with pytest.raises(ValueError, match=r"^algorithms.composer.LayerFreezing: "):
        build_library({"LayerFreezing": {"unknown": 1}})
