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
    """The lock has neither; where a developer has one, it is used."""
    if importlib.util.find_spec(package) is not None:
        arguments = {"init_kwargs": {"mode": "offline"}} if package == "wandb" else {}
        assert type(MAKE[package](arguments, tmp_path)).__name__.lower() == f"{package}logger"
        return
    with pytest.raises(InputError) as error:
        MAKE[package]({}, tmp_path)
    [line] = error.value.lines
    assert line.startswith(f'loggers.{package}: {package} is not installed; run: pip install "{package}>=')


def test_version_that_does_not_go_with_composer(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").touch()
    (tmp_path / "wandb-0.31.0.dist-info").mkdir()
    (tmp_path / "wandb-0.31.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: wandb\nVersion: 0.31.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"wandb 0\.31\.0 does not go with Composer; run: pip install"):
        MAKE["wandb"]({}, tmp_path)


@pytest.mark.parametrize("package", sorted(MAKE))
def test_unknown_arguments(package, tmp_path):
    with pytest.raises(InputError) as error:
        MAKE[package]({"projet": "a", "tags": [], "nme": "b"}, tmp_path)
    assert [line.partition(": ")[0] for line in error.value.lines] == [
        f"loggers.{package}.projet",
        f"loggers.{package}.nme",
    ]
    assert all("allowed: " in line and "tags" in line for line in error.value.lines)
