"""`python -m recipes.export`: the same predictions outside this project, and all or nothing in the folder."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import onnx
import pytest
import timm
import torch
from huggingface_hub import ModelCard

from algorithms.config import AlgorithmsConfig
from data.errors import InputError
from recipes.export import OURS, hub
from recipes.export.__main__ import preprocessing
from recipes.export.hub import card
from recipes.export.programs import architecture, examples, fixed_blurs, write_program, write_weights
from recipes.model import operated_network
from recipes.trained import labels, load_trained
from tests.recipes.checkpoints.tiny import at_most

OUTSIDE = """
import json, os, sys
import numpy as np, onnxruntime, safetensors.torch, timm, torch
from PIL import Image
from torchvision.transforms import v2

(folder, paths, cards) = json.loads(sys.argv[1])
prepared = json.load(open(f"{folder}/preprocessing.json"))
classes = json.load(open(f"{folder}/classes.json"))
model = timm.create_model("test_resnet", num_classes=len(classes)).eval()
weights = torch.load(f"{folder}/model.pth", weights_only=True)
model.load_state_dict(weights, strict=True)
other = safetensors.torch.load_file(f"{folder}/model.safetensors")
assert weights.keys() == other.keys() and all(torch.equal(weights[name], other[name]) for name in weights)
preprocess = v2.Compose([
    v2.Resize(prepared["resize_short_side"], v2.InterpolationMode(prepared["interpolation"]), antialias=True),
    v2.CenterCrop(prepared["size"]), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(prepared["mean"], prepared["std"]),
])
images = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])
program = torch.export.load(f"{folder}/model.pt2").module()
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")

def run(images):
    return torch.tensor(session.run(None, {"images": images.numpy()})[0])

with torch.no_grad():
    found = {"pth": model(images), "pt2": program(images), "onnx": run(images)}
ran = []
for place in cards:
    os.chdir(place)
    names = {}
    exec(open("code.py").read(), names)
    ran.append([names["preprocess"](names["image"]).tolist(), names["probabilities"].tolist()])
ours = ("recipes", "algorithms", "data", "composer", "entrypoint")
assert not [name for name in sys.modules if name.split(".")[0] in ours]
print(json.dumps([{name: logits.softmax(1).tolist() for name, logits in found.items()}, ran]))
"""


NETWORKS = [
    ({}, "resnet18", ["model.pth"]),
    ({}, "timm/resnet10t", ["model.safetensors"]),
    ({"blurpool": {}}, "resnet18", ["model.safetensors"]),
    ({"blurpool": {"blur_first": False, "min_channels": 1}}, "timm/resnet10t", ["model.pth"]),
    ({"squeeze_excite": {"min_channels": 64}}, "resnet18", ["model.pth", "model.pt2"]),
]


@pytest.fixture(scope="module")
def outside(tiny, exported, val, tmp_path_factory):
    """Predictions of the export, and of each card's code, in a fresh interpreter without this project on its path."""
    root = tmp_path_factory.mktemp("outside")
    folders = [root / str(number) for number in range(len(NETWORKS))]
    networks = [write_with_card(tiny, folder, *rest) for folder, rest in zip(folders, NETWORKS, strict=True)]
    words = json.dumps([exported, sorted(val.rglob("*.jpg")), folders], default=str)
    command = [sys.executable, "-I", "-c", OUTSIDE, words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    theirs, ran = json.loads(done.stdout)
    return theirs, zip(networks, ran, strict=True)


def write_with_card(tiny, folder, techniques, model, files):
    """A network with its files, a photo, and the code of its card as code.py."""
    folder.mkdir()
    trained = changed(load_trained(tiny.config), techniques, model)
    prepared, probe = preprocessing(trained.config, 32, 1.0), examples(32, 2, (0,) * 3, (1,) * 3)
    shape = architecture(trained, probe)
    for name in files:
        if name == "model.pt2":
            write_program(fixed_blurs(trained.network, probe), folder / name, probe)
        else:
            write_weights(trained.network, folder / name, {})
    text = card(trained, shape, prepared, {}, None, files)
    assert (shape.plain, "changed the architecture" in text) == (not techniques, bool(techniques))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    (folder / "code.py").write_text("\n".join(blocks))
    shutil.copy(next((tiny.images / "val").rglob("*.jpg")), folder / "photo.jpg")
    return trained.network


def changed(trained, techniques, model):
    """The trained network replaced by another one."""
    algorithms = AlgorithmsConfig.model_validate(techniques)
    settings = {"algorithms": algorithms, "model": trained.config.model.model_copy(update={"name": model})}
    config = trained.config.model_copy(update=settings)
    return dataclasses.replace(trained, network=operated_network(model, 3, algorithms), config=config)


def test_the_cards_code_loads_the_network(outside):
    for network, (image, found) in outside[1]:
        with torch.no_grad():
            expected = network(torch.tensor(image)[None])[0].softmax(0)
        assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_outside_this_project_the_predictions_are_the_same(command, tiny, outside, val):
    theirs, paths = outside[0], sorted(val.rglob("*.jpg"))
    _, out, _ = command("predict", tiny.yaml, *paths, "--json")
    ours = np.zeros((len(paths), 3))
    for row, line in enumerate(out.splitlines()):
        for entry in json.loads(line)["predictions"]:
            ours[row, entry["index"]] = entry["probability"]
    for name, found in theirs.items():
        # Decoding and resizing differ by a grey level here and there; the network itself does not.
        assert np.array(found) == pytest.approx(ours, abs=0.01), name
        assert (np.argmax(found, 1) == np.argmax(ours, 1)).all(), name
    assert np.array(theirs["onnx"]) == pytest.approx(np.array(theirs["pth"]), abs=1e-5)
    assert np.array(theirs["pt2"]) == pytest.approx(np.array(theirs["pth"]), abs=1e-5)


def test_the_folder_holds_what_was_promised(tiny, exported):
    assert {path.name for path in exported.iterdir()} == set(OURS)
    prepared = json.loads((exported / "preprocessing.json").read_text())
    assert (prepared["size"], prepared["resize_short_side"], prepared["crop_ratio"]) == (32, 36, 0.875)
    assert prepared["mean"] == [0.4, 0.4, 0.4]
    classes = json.loads((exported / "classes.json").read_text())
    assert [one["class"] for one in classes] == ["class0", "class1", "class2"]
    model = onnx.load(exported / "model.onnx")
    assert model.opset_import[0].version == 17
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_card_says_what_the_run_says(tiny, exported):
    card = (exported / "README.md").read_text()
    for size, figures in tiny.summary["eval_by_size"].items():
        accuracy = f"| {100 * figures['top1']:.2f} | {100 * figures['top5']:.2f} | {figures['loss']:.4f} |"
        assert f"| the run's validation images | {size} | 0.875 | no {accuracy}" in card
    assert tiny.summary["weights_sha256"] in card
    assert "timm's `test_resnet` with 3 classes" in card
    assert "3 epochs at 32 px" in card
    assert "24 images in each epoch" in card
    assert "`label_smoothing`: smoothing 0.1" in card
    assert f"composer {tiny.summary['versions']['composer']}" in card
    assert str(tiny.folder.parent) not in card
    assert str(tiny.images.parent) not in card


def test_other_weights_do_not_get_the_runs_figures(command, refused, tiny, tmp_path):
    words = ["--formats", "pth", "--weights", "raw", "--output", tmp_path / "raw"]
    assert command("export", tiny.yaml, *words)[0] == 0
    card = tmp_path / "raw" / "README.md"
    assert "Not measured for these weights." in card.read_text()
    assert "as trained, not averaged" in card.read_text()
    _, out, _ = command("evaluate", tiny.yaml, "--weights", "raw", "--sizes", "24", "--flip", "--json")
    (tmp_path / "raw.json").write_text(out)
    assert command("export", tiny.yaml, *words, "--force", "--evaluation", tmp_path / "raw.json")[0] == 0
    top1 = json.loads(out)["results"][0]["top1"]
    assert f"| dataset, 9 images | 24 | 0.875 | yes | {100 * top1:.2f} |" in card.read_text()
    for text in ("[" * 100_000, "[]", "{}", out.replace('"top1":', '"top":'), out.replace('"data": "', '"data": ["')):
        (tmp_path / "odd.json").write_text(text)
        err = refused("export", tiny.yaml, *words, "--force", "--evaluation", tmp_path / "odd.json")
        assert err == f"--evaluation: {tmp_path}/odd.json was not written by recipes.evaluate --save\n"
    words = ["--output", tmp_path / ("long" * 100)]
    assert "cannot be written: File name too long" in refused("export", tiny.yaml, *words)
    words = ["--output", tmp_path / "ema", "--evaluation", tmp_path / "raw.json"]
    assert "is about other weights than" in refused("export", tiny.yaml, *words)
    assert not (tmp_path / "ema").exists()


@pytest.mark.parametrize(
    ("model", "techniques"),
    [("timm/test_resnet", None), ("resnet18", {}), ("resnet18", {"blurpool": {}}), ("shufflenet_v2_x0_5", {})],
)
def test_timm_loads_the_folder_and_gives_the_same_logits(tiny, exported, tmp_path, model, techniques):
    trained, probe, folder = load_trained(tiny.config), examples(32, 2, (0.4,) * 3, (0.2,) * 3), exported
    if techniques is not None:
        trained, folder = changed(trained, techniques, model), tmp_path
        write_weights(trained.network, folder / "model.safetensors", {})
        prepared = preprocessing(trained.config, 32, 0.875)
        written = hub.write_timm_config(trained, folder, prepared, labels(trained, ""), probe)
        assert written == (folder / "config.json").exists() == (model == "resnet18" and not techniques)
        if not written:
            return
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert loaded(probe) == pytest.approx(trained.network(probe), abs=1e-5)
    found = timm.data.resolve_model_data_config(loaded)
    assert (found["input_size"], found["crop_pct"], found["interpolation"]) == ((3, 32, 32), 0.875, "bilinear")
    assert found["mean"] == pytest.approx(trained.config.data.mean)
    assert loaded.pretrained_cfg["label_names"] == ["class0", "class1", "class2"]


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as an upload needs; keeps what it was sent."""

    sent: ClassVar[list[tuple[str, str]]] = []
    status = 200

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.sent.append((self.path, body.decode()))
        answer = {"url": f"http://{self.headers['Host']}/someone/digits", "warnings": [], "errors": []}
        if "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            answer = {"files": [one | {"shouldIgnore": False} for one in files]}
        if "/commit/" in self.path:
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{answer['url']}/commit/0"}
        self.answer(self.status, answer)

    def do_GET(self):
        self.answer(404, {"error": "nothing yet"})

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


@contextmanager
def serving(handler):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_export_is_uploaded_with_the_metadata_that_a_hub_reads(command, refused, tiny, tmp_path, monkeypatch):
    words = ["--formats", "safetensors", "--push-to-hub", "someone/digits"]
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("recipes.export.hub.get_token", lambda: None)
    err = refused("export", tiny.yaml, *words, "--output", tmp_path / "none")
    assert err == "--push-to-hub: no access token; set HF_TOKEN, or run `hf auth login`\n"
    err = refused("export", tiny.yaml, *words[:3], "a b", "--output", tmp_path / "none")
    assert err.startswith("--push-to-hub: 'a b': Repo id must")
    monkeypatch.setattr("recipes.export.hub.get_token", lambda: "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving(Hub) as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr(Hub, "sent", [])
        status, out, err = command("export", tiny.yaml, *words, "--output", tmp_path / "sent")
        assert (err, status) == ("", 0)
        assert out.endswith(f"uploaded to {url}/someone/digits\n")
        (lines,) = [json.loads(f"[{','.join(body.splitlines())}]") for path, body in Hub.sent if "/commit/" in path]
        files = {one["value"]["path"]: one["value"]["content"] for one in lines if one["key"] == "file"}
        monkeypatch.setattr(Hub, "status", 403)
        status, _, err = command("export", tiny.yaml, *words, "--output", tmp_path / "refused")
        assert status == 2
        assert "403" in err.splitlines()[-1]
        assert err.endswith(f"{tmp_path / 'refused'} is complete, and can be uploaded later\n")
    assert set(files) == {path.name for path in (tmp_path / "sent").iterdir()}
    assert {name: base64.b64decode(text) for name, text in files.items()} == {
        name: (tmp_path / "sent" / name).read_bytes() for name in files
    }
    data = ModelCard.load(tmp_path / "sent" / "README.md").data
    assert (data.library_name, data.model_name) == ("timm", "tiny")
    measured = {(one.metric_name, one.metric_value) for one in data.eval_results}
    figures = tiny.summary["eval_by_size"].items()
    assert {(f"top-1 at {size} px", round(one["top1"], 6)) for size, one in figures} <= measured


def test_programs_of_changed_networks_are_right_too(tiny, tmp_path):
    probe = examples(32, 3, (0.5,) * 3, (0.2,) * 3)
    trained = changed(load_trained(tiny.config), {"blurpool": {}, "squeeze_excite": {}}, "resnet18")
    shape = architecture(trained, probe)
    assert (shape.plain, shape.techniques) == (False, ("blurpool", "squeeze_excite"))
    program = fixed_blurs(trained.network, probe)
    assert write_program(program, tmp_path / "model.onnx", probe) < 1e-4
    assert write_program(program, tmp_path / "model.pt2", probe) < 1e-4


class Fickle(torch.nn.Module):
    """Computes something else for two images than for other numbers, which no trace can tell."""

    def forward(self, images):
        return images.mean((2, 3)) * (1 if len(images) == 2 else 2)


def test_a_program_that_differs_is_refused(tmp_path):
    probe = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"model.onnx: its logits differ from the network's by 0\.\d+, allowed 0.0001"):
        write_program(Fickle().eval(), tmp_path / "model.onnx", probe)
    with pytest.raises(InputError, match=r"model.pt2: .*; choose other --formats|model.pt2: its logits differ"):
        write_program(Fickle().eval(), tmp_path / "model.pt2", probe)


def test_a_folder_with_something_in_it_is_left_alone(command, refused, tiny, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / "model.onnx").write_text("an earlier export")
    err = refused("export", tiny.yaml, "--output", output, "--formats", "pth")
    assert err == f"--output: {output} is not empty; choose another, or replace an earlier export with --force\n"
    assert sorted(path.name for path in output.iterdir()) == ["model.onnx", "notes.txt"]
    assert command("export", tiny.yaml, "--output", output, "--formats", "pth", "--force")[0] == 0
    names = {path.name for path in output.iterdir()}
    assert names == {"notes.txt", "model.pth", "preprocessing.json", "classes.json", "README.md"}
    assert (output / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing_half_written(refused, tiny, tmp_path):
    with at_most(2**20):
        err = refused("export", tiny.yaml, "--output", tmp_path / "output", "--formats", "safetensors")
    assert "File too large" in err
    assert list(tmp_path.iterdir()) == []
