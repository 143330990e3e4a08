"""The notebooks run from top to bottom, p3.ipynb in its small mode, and leave what they promise."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient

from tests.support import ROOT

PNG = b"\x89PNG"


class ThisPython(KernelManager):
    """Starts this interpreter, whatever kernels are installed under the name that a notebook asks for."""

    @property
    def kernel_spec(self):
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


def pictures(notebook):
    """The pictures that each code cell shows."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [sum("image/png" in output.get("data", {}) for output in shown) for shown in outputs]


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Run a notebook as Jupyter does, in its own folder; gives it with its outputs, and where it wrote."""

    def play(name):
        work, place = tmp_path / "work", str(ROOT / "notebooks")
        values = {"WORK": work, "IPYTHONDIR": tmp_path / "ipython", "JUPYTER_RUNTIME_DIR": tmp_path / "jupyter"}
        for key, value in (values | {"OMP_NUM_THREADS": "1"}).items():
            monkeypatch.setenv(key, str(value))
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        manager = ThisPython(transport="ipc", ip=str(tmp_path / "kernel"))
        NotebookClient(notebook, timeout=300, km=manager, resources={"metadata": {"path": place}}).execute()
        return notebook, work

    return play


@pytest.mark.parametrize("name", ["local.ipynb", "p3.ipynb"])
def test_a_notebook_is_valid_and_holds_no_outputs_and_its_links_point_to_something(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert len(notebook.cells) > len(code) > 10
    assert all(len(line) <= 160 for cell in code for line in cell.source.splitlines())
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    links = [part.partition(")")[0] for text in prose for part in text.split("](")[1:]]
    assert links
    assert [link for link in links if not (ROOT / "notebooks" / link).is_file()] == []


def test_the_laptop_s_notebook(play):
    notebook, work = play("local.ipynb")
    summary = json.loads((work / "demo" / "summary.json").read_text())
    assert summary["finished"]
    assert summary["top1"] > 0.5
    figures = json.loads((work / "figures.json").read_text())
    assert [one["size"] for one in figures["results"]] == [24, 28, 32, 36, 40, 44]
    trained = next(one for one in figures["results"] if one["size"] == 36)
    assert trained["top1"] == pytest.approx(summary["top1"], abs=1e-6)
    assert (work / "demo" / "find_lr" / "lr.png").read_bytes()[:4] == PNG
    assert (work / "demo" / "report.html").is_file()
    assert {"model.onnx", "model.pth", "model.safetensors", "README.md"} <= {
        path.name for path in (work / "exported").iterdir()
    }
    predictions = [json.loads(line) for line in (work / "predictions.jsonl").read_text().splitlines()]
    right = [Path(one["image"]).parent.name == one["predictions"][0]["class"] for one in predictions]
    assert len(right) >= 24
    assert sum(right) / len(right) > 0.5
    assert sum(pictures(notebook)) >= 7


def test_the_notebook_for_eight_gpus_in_its_small_mode(play):
    notebook, work = play("p3.ipynb")
    summary = json.loads((work / "p3" / "summary.json").read_text())
    assert summary["finished"]
    assert summary["eval_by_size"].keys() == {"32", "40"}
    assert summary["eval_by_size"]["32"]["top1"] > 0.5
    assert len(summary["resumed_from"]) == 1
    for picture in ("plan/schedule.png", "p3/find_lr/lr.png", "p3-ablate/accuracy.png"):
        assert (work / picture).read_bytes()[:4] == PNG
    for page in ("plan/plan.html", "p3/report.html", "p3-ablate/ablation.html", "compare.html"):
        assert "</html>" in (work / page).read_text()
    assert sum(pictures(notebook)) == 3
