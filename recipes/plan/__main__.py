"""`python -m recipes.plan YAML ... [key=value ...]`: stages, compute, time, price and memory, before a run starts.

Several YAMLs are compared in one table, with the accuracy that their authors published.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.files import is_remote, replace_text, writing
from recipes import output
from recipes.cli import command_parser, hardware_of, quick_imports, run_command, stated, yamls_and_overrides
from recipes.config import RunConfig
from recipes.load import load_config, load_table
from recipes.output import ABSENT, COLORS, Content, Table, chart, duration, svg
from recipes.plan import (
    PRICES,
    REFERENCE_SIZE,
    Images,
    MachineConfig,
    PricesConfig,
    Throughput,
    make_plan,
    measured,
    momentum_at,
    published,
    schedule_of,
)
from recipes.results import to_json
from recipes.schedule import Rate, epoch_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """examples:
  %(prog)s yamls/p3.yaml
  %(prog)s yamls/p3.yaml max_duration=16ep \\
      algorithms.progressive_resizing=off
  %(prog)s yamls/mosaic-medium.yaml --memory \\
      --machine p4d.24xlarge
  %(prog)s yamls/ffcv.yaml yamls/timm-a3.yaml \\
      --machine p4d.24xlarge
  %(prog)s yamls/g5.yaml --images-per-second 3000
  %(prog)s yamls/p3.yaml --measured runs/p3-trial

Prices are read from recipes/plan/prices.yaml, published throughput from
recipes/plan/throughput.yaml. Each entry names its source."""
SHOWN = 8  # stages shown one by one; with more, short neighbours share a row
MOST = 10**9  # devices, images, images per second
POINTS = 2_000  # points of a curve in the chart, at most


def _parse_arguments() -> argparse.Namespace:
    parser = command_parser("plan", "Show a run's stages, compute, time and price before it starts.", EXAMPLES)
    add = parser.add_argument
    add("--machine", metavar="NAME", help="a machine in the price list (default: the YAML's `# Hardware:`)")
    add("--prices", type=Path, default=PRICES, metavar="FILE", help="price list (default: recipes/plan/prices.yaml)")
    add("--devices", type=int, metavar="N", help="processes (default: the machine's devices)")
    text = "number of images (default: counted at data.path)"
    add("--images", type=int, nargs=2, metavar=("TRAIN", "VAL"), help=text)
    text = "folder of a run whose measured throughput to use (default: runs_folder/run_name, if it has any)"
    add("--measured", type=Path, metavar="RUN", help=text)
    add("--images-per-second", type=float, metavar="N", help="throughput of plain training at 224 px, over all devices")
    add("--memory", action="store_true", help="build the network to show memory, and count FLOPs instead of image area")
    add("--json", action="store_true", help="print JSON, and write no files")
    text = "folder for plan.html and schedule.png (default: runs_folder/run_name/plan)"
    add("--out", type=Path, metavar="FOLDER", help=text)
    given = parser.parse_intermixed_args(sys.argv[1:])
    given.yamls, given.overrides = yamls_and_overrides(parser, given.words)
    for name, value in (("--devices", given.devices), ("--images-per-second", given.images_per_second)):
        if value is not None and not 0 < value <= MOST:
            parser.error(f"argument {name}: got {value}; allowed: above 0, at most {MOST:,}")
    if given.images is not None and not 1 <= min(given.images) <= max(given.images) <= MOST:
        parser.error(f"argument --images: got {given.images[0]} {given.images[1]}; allowed: 1 to {MOST:,} each")
    if given.images_per_second is not None and given.measured is not None:
        parser.error("--images-per-second and --measured both set the throughput; give only one")
    return given


def _count_images(config: RunConfig, given: Sequence[int] | None) -> tuple[Images, int]:
    """The number of images and classes of the dataset; ImageNet-1K's if it is not on this machine."""
    path, limit, classes = config.data.path, config.data.train_samples, 1000
    if given is not None:
        images = Images(given[0], given[1], "given: --images")
    elif is_remote(path) or not Path(path).exists():
        images = Images(1_281_167, 50_000, f"ImageNet-1K; {path} is not on this machine")
    else:
        from data.open import open_split_pair  # imports OpenCV, which is needed only to open a dataset

        train, val = open_split_pair(path, config.data.cache_folder)
        images, classes = Images(len(train), len(val), f"counted in {path}"), len(train.classes)
    if limit is not None and limit < images.train:
        images = images._replace(train=limit, source="data.train_samples")
    return images, config.model.num_classes or classes


def _find_throughput(given: argparse.Namespace, config: RunConfig, device: str, devices: int) -> Throughput | None:
    """The given throughput, else one measured by the named run or by this one, else a published one; None: unknown."""
    if given.images_per_second is not None:
        return Throughput({REFERENCE_SIZE: given.images_per_second}, "given: --images-per-second")
    try:
        return measured(given.measured or Path(config.runs_folder) / config.run_name)
    except InputError:
        if given.measured is not None:
            raise
        return published(config, device, devices)


def _compute(
    given: argparse.Namespace, path: Path, config: RunConfig, machines: dict[str, MachineConfig]
) -> tuple[dict[str, Any], Throughput | None]:
    """The plan, for the machine that is named by --machine or by the YAML's comment, and the throughput behind it."""
    if given.machine is not None and given.machine not in machines:
        raise InputError(f"--machine: {given.machine!r} is not in {given.prices}; allowed: {', '.join(machines)}")
    hardware = hardware_of(path)
    words, found = re.findall(r"[\w.-]+", hardware), re.search(r"(\d+)x (\S+)", hardware)  # such as `8x A100`
    name = given.machine or next((name for name in machines if name in words), None)
    machine = machines[name] if name else None
    if machine is not None:
        device, devices = machine.device, machine.devices
    else:
        device, devices = (found[2], int(found[1])) if found else (hardware, 1)
    if given.machine is not None:
        hardware = f"{devices}x {device} ({name})"
    devices = given.devices or devices
    images, classes = _count_images(config, given.images)
    throughput = _find_throughput(given, config, device, devices)
    network = None
    if given.memory:
        if sys.stderr.isatty():
            print("loading torch and Composer, building the network ...", file=sys.stderr)
        with quick_imports():
            from recipes.model import planned_network

        network = planned_network(config, classes)
    return make_plan(config, images, devices, hardware, name, machine, throughput, network), throughput


def _describe(
    plan: dict[str, Any], config: RunConfig, throughput: Throughput | None, machines: dict[str, MachineConfig]
) -> Content:
    """The plan as text, at most 80 columns wide; the section `Run` is its heading."""
    stages, times, memory = [], [], []
    machine = machines[plan["machine"]] if plan["machine"] else None
    vcpus = machine and machine.vcpus
    for row in _group_rows(plan["stages"]):
        first, last = row[0], row[-1]
        where = [_span(first["first_epoch"] + 1, last["first_epoch"] + last["epochs"]), _span(*_column(row, "size"))]
        counts = (first["global_batch_size"], sum(_column(row, "steps")))
        ends = [Rate(**first["first"]), Rate(**last["last"])]
        lr = " to ".join(dict.fromkeys(_number(rate.lr) for rate in ends))
        momentum = " to ".join(dict.fromkeys(_momentum(momentum_at(config, rate)) for rate in ends))
        compute = sum(_column(row, "epochs_at_224px"))
        stages.append((*where, *(f"{count:,}" for count in counts), lr, momentum, f"{compute:.4g}"))
        if plan["hours"] is not None:
            hours = sum(_column(row, "hours"))
            rate = sum(stage["images_per_second"] * stage["hours"] for stage in row) / hours
            rates = (rate, rate / plan["devices"], rate / vcpus if vcpus else None)
            needed = (ABSENT if value is None else f"{value:,.0f}" for value in rates)
            times.append((*where, _span(*_column(row, "loader_size")), *needed, duration(3600 * hours)))
        if first["memory_gb"] is not None:
            has = plan["device_memory_gb"]
            memory.append((*where, f"{max(_column(row, 'memory_gb')):.1f}", ABSENT if has is None else f"{has:.1f}"))
    totals = {"evaluation": "evaluation_hours", "checkpoints": "checkpoint_hours", "all": "hours"}
    times += [(name, *[""] * 5, duration(3600 * plan[key])) for name, key in totals.items() if plan[key] is not None]
    stage_headers = ("epochs", "px", "batch", "steps", "learning rate", "momentum", "224-epochs")
    time_headers = ("epochs", "px", "loader px", "images/s needed", "per device", "per vCPU", "time")
    memory_table = Table(("epochs", "px", "GB per device", "GB it has"), memory, range(1, 4))
    no_memory = "memory per device: add --memory, which also counts FLOPs instead of area (loads torch, about 10 s)"
    words = output.sections(
        "plan/notes.txt.jinja",
        plan=plan,
        throughput=throughput,
        auto=config.device_microbatch_size == "auto",
        prices=machine.prices if machine else {},
        dollars={cost["kind"]: cost["dollars"] for cost in plan["costs"]},
        machines=machines,
        number=_number,
        momentum=_momentum,
    )
    return {
        "Run": words["Run"],
        "Schedule": [Table(stage_headers, stages, range(1, 7))],
        "Compute": words["Compute"],
        "Time and loader": [*([Table(time_headers, times, range(1, 7))] if times else []), *words["Throughput"]],
        "Price": words["Price"],
        "Memory": [memory_table if memory else no_memory, *words.get("Microbatches", [])],
    }


def _group_rows(stages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """A row for each stage; if there are many, short neighbours that differ only in size share one."""
    total = sum(_column(stages, "epochs"))

    def key(stage: dict[str, Any]) -> object:
        short = len(stages) > SHOWN and 8 * stage["epochs"] < total
        return (stage["global_batch_size"], stage["crop"]) if short else stage["first_epoch"]

    return [list(row) for _, row in groupby(stages, key)]


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def _span(*values: int) -> str:
    """`224`, or `128-160`."""
    return "-".join(map(str, dict.fromkeys((min(values), max(values)))))


def _number(value: float) -> str:
    """A learning rate in three digits."""
    return f"{value:.3g}" if value >= 0.001 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _momentum(value: float | None) -> str:
    return "default" if value is None else f"{value:.3g}"


def _draw_schedule(figure: Figure, plan: dict[str, Any], config: RunConfig) -> None:
    """Draw image size, batch size, learning rate and momentum over epochs into an empty figure."""
    stages = plan["stages"]
    steps, rate_at = schedule_of(config, epoch_plan(config, plan["devices"]), plan["images"]["train"])
    stride = max(1, sum(steps) // POINTS)
    points = [(e, batch) for e, count in enumerate(steps) for batch in sorted({*range(0, count, stride), count - 1})]
    epochs = [epoch + batch / steps[epoch] for epoch, batch in points]
    rates = [rate_at(epoch, batch) for epoch, batch in points]
    momenta = [momentum_at(config, rate) or math.nan for rate in rates]
    edges = [*_column(stages, "first_epoch"), config.epochs]
    sizes, loader, batches = (_column(stages, name) for name in ("size", "loader_size", "global_batch_size"))
    line: dict[str, Any] = {"baseline": None, "linewidth": 1.8, "zorder": 3}
    size_axes, batch_axes, lr_axes, momentum_axes = figure.subplots(4, 1, sharex=True)
    size_axes.stairs(sizes, edges, **line, color=COLORS[0], label="network")
    if sizes != loader:
        size_axes.stairs(loader, edges, **line, color=COLORS[1], linestyle="--", label="loader")
        size_axes.legend(loc="lower right")
    batch_axes.stairs(batches, edges, **line, color=COLORS[0])
    lr_axes.plot(epochs, [rate.lr for rate in rates], color=COLORS[0])
    momentum_axes.plot(epochs, momenta, color=COLORS[0])
    size_axes.set(title=f"{config.run_name}: schedule", ylabel="image size (px)")
    batch_axes.set(ylabel="batch (images)", ylim=(0, 1.15 * max(batches)))
    lr_axes.set(ylabel="learning rate", ylim=(0, None))
    momentum_axes.set(ylabel="momentum", xlabel="epoch", xlim=(0, config.epochs))
    figure.align_ylabels()


def _compare(plans: Sequence[dict[str, Any]], as_json: bool) -> int:
    """Print several plans as a table, a row each, and what was published about them."""
    if as_json:
        print(to_json(plans, indent=2))
        return 0
    rows, lines = [], []
    for plan in plans:
        name, said = plan["run_name"], plan["published"]
        dollars = f"{plan['costs'][0]['dollars']:,.2f}" if plan["costs"] else ABSENT
        hours = ABSENT if plan["hours"] is None else duration(3600 * plan["hours"])
        accuracy = said.partition(" top-1")[0] or ABSENT
        where = plan["machine"] or plan["hardware"]
        rows.append((name, plan["epochs"], f"{plan['epochs_at_224px']:.4g}", where, hours, dollars, accuracy))
        lines += [f"{name}: {said}"] if said else []
    headers = ("recipe", "epochs", "224-epochs", "on", "time", "dollars", "published")
    output.show({"Recipes": [Table(headers, rows, (1, 2, 4, 5))], "Published top-1": [*lines]})
    return 0


def main() -> int:
    """Print the plan, then write its page; returns the exit status."""
    given = _parse_arguments()
    configs = [load_config(path, given.overrides) for path in given.yamls]
    machines = load_table(given.prices, PricesConfig).machines
    plans = [_compute(given, path, one, machines) for path, one in zip(given.yamls, configs, strict=True)]
    if len(plans) > 1:
        said = [stated(path, "Published", "") for path in given.yamls]
        return _compare([plan | {"published": text} for (plan, _), text in zip(plans, said, strict=True)], given.json)
    (config,), ((plan, throughput),) = configs, plans
    if given.json:
        print(to_json(plan, indent=2))
        return 0
    content = _describe(plan, config, throughput, machines)
    about = list(map(str, content.pop("Run")))
    output.show(content, *about)
    sys.stdout.flush()  # the chart takes another second
    folder = given.out or Path(config.runs_folder) / config.run_name / "plan"
    with chart(9, 8) as drawn:
        _draw_schedule(drawn, plan, config)
        content["Schedule"].insert(0, output.Chart(svg(drawn, "the run's schedule")))
        page = output.render_page(f"Plan: {config.run_name}", "; ".join(about), content=content)
        with writing(folder, "; see --out"):
            output.save(drawn, folder / "schedule.png")
            replace_text(folder / "plan.html", page)
    print(f"picture: {folder / 'schedule.png'}\npage: {folder / 'plan.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
