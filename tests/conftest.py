"""What tests share: tiny images on disk, and a run of the whole program in this process."""

import atexit
import contextlib
import ctypes
import gc
import json
import sys

import hypothesis
import pytest

from recipes.cli import quick_imports
from tests.support import process_as_before, write_images

# Hypothesis's limit of 200 ms an example says more about what else the machine does than about the code.
hypothesis.settings.register_profile("no deadline", deadline=None)
# A mutant is killed by the first example that fails; to look for a smaller one takes a hundred times as long.
hypothesis.settings.register_profile(
    "mutants", deadline=None, phases=set(hypothesis.Phase) - {hypothesis.Phase.shrink, hypothesis.Phase.explain}
)
hypothesis.settings.load_profile("no deadline")

SLOW = """notebooks trained two_nodes hangs kill_resume ablate_runs handwritten_loop processes yamls store_faults output
data_in_a_bucket trainer host_reads compile"""
"""What takes longest, which `make test` starts first, so that none of it is left over for one worker at the end."""


_importing = contextlib.ExitStack()  # until the tests' modules have imported what takes seconds
_importing.enter_context(quick_imports())


def pytest_collection_finish():
    _importing.close()


pytest_unconfigure = pytest_collection_finish  # the process that only distributes the tests collects none


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(SLOW.split())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=lambda item: order.get(group_of(item), len(order)))


def group_of(item):
    """What one worker runs: a file, or the folder whose files look at the same trained run."""
    folder = item.path.parent.name
    return folder if folder == "trained" else item.path.stem.removeprefix("test_")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An ImageFolder of 24 training and 9 validation images in 3 classes."""
    return write_images(tmp_path_factory.mktemp("images") / "dataset")


@pytest.fixture(scope="module", autouse=True)
def _process_as_before_the_module():
    """What a module's own fixtures run leaves the process as it was for the modules after it, also in memory."""
    if "composer.core.engine" in sys.modules:
        from composer.core.engine import Engine
        from torch.distributed.checkpoint.state_dict import _get_fqns

        # Composer keeps each Trainer's state, network included, until the process ends, and torch each saved network.
        atexit.unregister(Engine._close)
        if hasattr(_get_fqns, "cache_clear"):  # torch 2.7; 2.15 keeps none
            _get_fqns.cache_clear()
    # Trainers and clients are in reference cycles. Python looks for these the more rarely, the more objects there are,
    # however large their tensors: so what stays for good is not counted.
    gc.collect()
    gc.freeze()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps what is freed in between
        trim(0)
    with process_as_before():
        yield


@pytest.fixture(autouse=True)
def _process_as_before_the_test():
    with process_as_before():
        yield


@pytest.fixture
def train(tmp_path, images):
    """Run a YAML with overrides in this process: `train(path, "key=value", ...) -> (status, summary)`."""

    def train(path, *overrides):
        from recipes.load import load_config
        from recipes.run import run

        config = load_config(path, [f"runs_folder={tmp_path}", f"data.path={images}", *overrides])
        status = run(config)
        return status, json.loads((tmp_path / config.run_name / "summary.json").read_text())

    return train
