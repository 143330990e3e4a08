"""A run of a tiny network that saves and resumes, in this process, and checkpoints without one."""

import hashlib
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import torch
from composer import Callback
from composer.algorithms import EMA, BlurPool, LabelSmoothing
from composer.models import ComposerClassifier

from recipes.checkpoints.claim import Owner
from recipes.checkpoints.format import pack, unpack
from recipes.checkpoints.interrupt import Interrupt, Interrupted
from recipes.checkpoints.manifest import FileEntry, Identity, load_manifest, publish
from recipes.checkpoints.resume import find_newest, find_resume
from recipes.checkpoints.save import CheckpointManager, Snapshot, upload_finished
from recipes.checkpoints.store import LocalStore, Places
from recipes.config import RunConfig
from recipes.step import SteadyTrainer

BATCHES = 5
"""Batches in an epoch of the tiny run."""


def loader():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8 * BATCHES, 3, 8, 8, generator=generator)
    labels = (images.mean((1, 2, 3)) > 0).long()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)


def network():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten()]
    return ComposerClassifier(torch.nn.Sequential(*layers, torch.nn.Linear(72, 2)), num_classes=2)


def identity(run_name="tiny", lr=0.1):
    config = {"optimizer": {"lr": lr}}
    return Identity(run_name=run_name, config_digest=f"digest of {lr}", config=config, world_size=1)


def algorithms():
    return [BlurPool(min_channels=1), EMA(half_life="4ba"), LabelSmoothing()]


class At(Callback):
    """Runs `action(state)` once, at an event and a global batch."""

    def __init__(self, event, batch, action):
        self.name, self.batch, self.action, self.done = event, batch, action, False

    def run_event(self, event, state, logger):
        if event.value == self.name and int(state.timestamp.batch) == self.batch and not self.done:
            self.done = True
            self.action(state)


class Tiny:
    """One run under `folder`; each `go` is a process's part of it, from `find_resume` to the end."""

    def __init__(self, folder, remote=None, epochs=3, **saving):
        self.places = Places(folder / "checkpoints", remote, folder)
        self.saving = {"interval": "2ba", "patience": "2s"} | saving
        self.epochs = epochs
        self.identity = identity()
        self.kept = None

    def config(self, restart=False, **more):
        saving = self.saving | {"restart": restart}
        return RunConfig(run_name="tiny", data={"path": "nowhere"}, device_batch_size=8, checkpoints=saving, **more)

    def find(self, **more):
        return find_resume(self.config(**more), self.places, self.identity)

    def go(self, *callbacks, **more):
        """Train on; returns the trained weights, or the `Interrupted` that ended it."""
        with Owner(self.places, self.identity.run_name) as owner:
            return self._go(owner, *callbacks, **more)

    def _go(self, owner, *callbacks, **more):
        self.resume = self.find(**more)
        model = network()
        self.interrupt = Interrupt()
        self.checkpoints = checkpoints = CheckpointManager(
            self.config(**more),
            places=self.places,
            identity=self.identity,
            owner=owner,
            resume=self.resume,
            interrupt=self.interrupt,
            top1=lambda state: state.eval_metrics["eval"]["MulticlassAccuracy"].compute().item(),
        )
        trainer = SteadyTrainer(
            images_of=lambda epoch, batch: 8,
            model=model,
            train_dataloader=loader(),
            eval_dataloader=loader(),
            max_duration=f"{self.epochs}ep",
            algorithms=algorithms(),
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            callbacks=[*callbacks, checkpoints],
            progress_bar=False,
            auto_log_hparams=False,
            python_log_level=None,
            spin_dataloaders=True,  # the real run's sampler starts at its batch; this loader has to be spun
            seed=1,
        )
        self.state, self.logger = trainer.state, trainer.logger
        try:
            trainer.fit()
            self.status = checkpoints.finish()
            self.kept = self.status == 0
        except Interrupted as stop:
            return stop
        finally:
            trainer.close()
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stems(self):
        return sorted(path.stem for path in self.places.local.glob("*.json"))

    def upload_finished(self, resume):
        with Owner(self.places, self.identity.run_name) as owner:
            places, interrupt = self.places, Interrupt()
            return upload_finished(
                self.config(), places=places, owner=owner, resume=resume, interrupt=interrupt, with_logs=True
            )

    def interrupt_at(self, batch, event="batch_end", grace=20.0):
        return At(event, batch, lambda state: self.interrupt.request("a test", grace))


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def damage(path: Path, kind: str):
    """Spoil a file: flip one bit in its middle, cut it, or empty it."""
    data = bytearray(path.read_bytes())
    if kind == "bit":
        data[len(data) // 2] ^= 1
    elif kind == "empty":
        data = bytearray()
    elif kind == "longer":
        data += b"x"
    else:
        del data[int(len(data) * float(kind)) :]
    path.write_bytes(bytes(data))


@contextmanager
def at_most(size):
    """No file may grow beyond `size` bytes: what a full disk looks like, for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def snapshot(batch, epoch=0, top1=None, payload=None, who=None):
    """A checkpoint without a run: one tensor of 2,720 bytes that no other batch has."""
    if payload is None:
        weights = torch.frombuffer(bytearray(hashlib.sha256(str(batch).encode()).digest() * 85), dtype=torch.uint8)
        time = {"epoch": epoch, "batch": batch, "batch_in_epoch": batch, "sample": 8 * batch}
        state = {"model": {"weights": weights}, "optimizers": {}, "timestamp": {"Timestamp": time}}
        state["algorithms"] = [(type(algorithm).__qualname__, {}) for algorithm in algorithms()]
        payload = pack({"state": state, "rng": []})
    about = {"epoch": epoch, "batch_in_epoch": batch, "batch": batch, "samples": 8 * batch, "top1": top1}
    return Snapshot(payload, (who or identity()).model_dump() | about)


def plant(folder, stem, payload):
    """Put other bytes in a checkpoint's place, with a manifest that is true to them, as a thief of keys could."""
    store, data = LocalStore(folder), b"".join(payload)
    manifest = load_manifest(store, stem)
    (folder / manifest.files[0].name).write_bytes(data)
    entry = FileEntry(name=manifest.files[0].name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    store.put(f"{stem}.json", manifest.model_copy(update={"files": (entry,)}).to_json())


def content_of(folder, stem):
    """A checkpoint's content, to be changed and planted."""
    return unpack((folder / f"{stem}.safetensors").read_bytes())


def save(store, batch, **settings):
    taken = snapshot(batch, **settings)
    manifest = taken.manifest()
    publish(store, manifest, lambda: store.put(manifest.file.name, taken.payload))
    return taken.stem


def look(store, remote=None, **settings):
    """The newest good checkpoint, or None."""
    return search(store, remote, **settings)[0]


def search(store, remote=None, who=None, restart=False):
    """As `find_newest`: the newest good checkpoint, and why others cannot be used."""
    stores = [store] if remote is None else [store, remote]
    return find_newest(stores, who or identity(), restart=restart)


class Dying(LocalStore):
    """Is killed at its `steps`-th change of the folder."""

    def __init__(self, folder, steps):
        super().__init__(folder)
        self.steps = steps

    def _step(self):
        self.steps -= 1
        if self.steps < 0:
            raise KeyboardInterrupt

    def put(self, name, source):
        self._step()
        super().put(name, source)

    def delete(self, names):
        for name in names:
            self._step()
            super().delete([name])
