import importlib.util

import pytest

from recipes.errors import InputError
from recipes.watch.external import mlflow_logger, wandb_logger

MAKE = {
    "wandb": lambda arguments, folder: wandb_logger(arguments, "run", folder),
    "mlflow": lambda arguments, _: mlflow_logger(arguments, "run"),
}


@pytest.mark.parametrize("package", sorted(MAKE))
def test_missing_package(package, tmp_path):
    if importlib.util.find_spec(package) is not None:
        assert type(MAKE[package]({}, tmp_path)).__name__.lower() == f"{package}logger"
        return
    with pytest.raises(InputError) as error:
        MAKE[package]({}, tmp_path)
    assert error.value.lines == (
        f"loggers.{package}: {package} is not installed; run: pip install {package}, or leave it out",
    )


@pytest.mark.parametrize("package", sorted(MAKE))
def test_unknown_arguments(package, tmp_path):
    with pytest.raises(InputError) as error:
        MAKE[package]({"projet": "a", "tags": [], "nme": "b"}, tmp_path)
    assert [line.partition(": ")[0] for line in error.value.lines] == [
        f"loggers.{package}.projet",
        f"loggers.{package}.nme",
    ]
    assert all("allowed: " in line and "tags" in line for line in error.value.lines)
