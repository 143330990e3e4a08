import ast
import inspect
import subprocess
import sys

import composer.algorithms
import pytest
from composer.core import Algorithm

from algorithms.composer_library import NOT_RESUMABLE, ROOMS, UNSUITABLE, build_library, problems
from algorithms.composer_library.library import signatures, writable
from algorithms.config import AlgorithmsConfig

CLASSES = {
    name: item
    for name, item in vars(composer.algorithms).items()
    if inspect.isclass(item) and issubclass(item, Algorithm)
}
USABLE = sorted(CLASSES.keys() - ROOMS.keys() - UNSUITABLE.keys())


def test_the_source_is_read_as_python_reads_it():
    assert signatures().keys() == CLASSES.keys()
    for name, item in CLASSES.items():
        expected = inspect.signature(item.__init__).parameters
        if item.__init__ is Algorithm.__init__:
            expected = {}
        read = signatures()[name]
        assert list(read) == [key for key in expected if key != "self"]
        for key, argument in read.items():
            default = expected[key].default
            assert (argument.default is None) == (default is inspect.Parameter.empty)
            if argument.default is not None and not argument.default.startswith("Event."):
                assert ast.literal_eval(argument.default) == default


def test_every_algorithm_of_composer_is_decided_on():
    assert CLASSES.keys() >= ROOMS.keys() | UNSUITABLE.keys() | NOT_RESUMABLE.keys()
    assert not ROOMS.keys() & UNSUITABLE.keys()
    assert set(ROOMS.values()) <= AlgorithmsConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        ("int", int),
        ("Optional[str]", str | None),
        ("Union[bool, str]", bool | str),
        ("Union[float, Time, str]", float | str),
        ("int | None", int | None),
        ("Callable[[int], int]", None),
        ("Union[Time, Event]", None),
        ("Optional[Event]", None),
    ],
)
def test_the_part_of_an_annotation_that_yaml_can_write(annotation, kind):
    assert writable(ast.parse(annotation, mode="eval").body) == kind


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"BlurPool": {}}, [("BlurPool", "has a line of its own; write algorithms.blurpool")]),
        ({"SAM": {}}, [("SAM", "has a line of its own; write algorithms.sam")]),
        ({"Alibi": {}}, [("Alibi", "language models")]),
        ({"Cutout": {}}, [("Cutout", "did you mean CutOut?")]),
        ({"blur_pool": {}}, [("blur_pool", "did you mean BlurPool?")]),
        ({"CutOut": {"num_hole": 1}}, [("CutOut.num_hole", "did you mean num_holes?")]),
        ({"CutOut": {"num_holes": "2"}}, [("CutOut.num_holes", "got '2'; allowed: int")]),
        ({"CutOut": {"length": True}}, [("CutOut.length", "got True; allowed: float")]),
        ({"LowPrecisionLayerNorm": {"apply_at": "init"}}, [("LowPrecisionLayerNorm.apply_at", "cannot be written")]),
        (
            {"GhostBatchNorm": {"size": 8}, "Nonsense": {}},
            [("GhostBatchNorm.size", "allowed: ghost_batch_size"), ("Nonsense", "allowed: CutOut, Factorize")],
        ),
    ],
)
def test_a_wrong_choice_is_named_with_what_is_allowed(chosen, expected):
    found = problems(chosen)
    assert [key for key, _ in found] == [key for key, _ in expected]
    assert all(word in text for (_, text), (_, word) in zip(found, expected, strict=True))


def test_an_integer_may_stand_for_a_float():
    assert problems({"CutOut": {"num_holes": 2, "length": 1}}) == []


def test_a_value_that_composer_refuses_is_named():
    with pytest.raises(ValueError, match=r"^algorithms.composer.LayerFreezing: "):
        build_library({"LayerFreezing": {"unknown": 1}})


ARGUMENTS = {
    "Factorize": {"min_channels": 8, "min_features": 4, "latent_features": 2},
    "GhostBatchNorm": {"ghost_batch_size": 4},
    "GyroDropout": {"sigma": 8, "tau": 4},
}


@pytest.mark.parametrize("name", USABLE)
def test_what_is_not_refused_trains_and_resumes_as_declared(name, run, tmp_path, assert_resumes, same_weights):
    chosen = {"composer": {name: ARGUMENTS.get(name, {})}}
    if name in NOT_RESUMABLE:
        assert AlgorithmsConfig.model_validate(chosen).not_resumable == {f"composer.{name}": NOT_RESUMABLE[name]}
        through = run(chosen, save=(7, tmp_path / "saved.pt")).fit()
        with pytest.raises(AssertionError):
            same_weights(through, run(chosen, load=tmp_path / "saved.pt").fit())
    else:
        assert_resumes(chosen, batch=7)


def test_looking_for_algorithms_does_not_import_composer():
    code = (
        "import sys; from algorithms.composer_library import problems;"
        "assert problems({'Nonsense': {}}); sys.exit('composer' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
