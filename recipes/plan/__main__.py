"""`python -m recipes.plan YAML [key=value ...]`: what a run will be, take and cost."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from data.open import open_split_pair
from data.remote import is_remote
from recipes.cli import command_parser, hardware_of, run_command, yaml_and_overrides
from recipes.config import RunConfig
from recipes.errors import InputError
from recipes.json_text import to_json
from recipes.load import load_config, load_table
from recipes.plan.compute import Stage, by_area, plan_stages
from recipes.plan.plan import Images, Plan, as_json, make_plan
from recipes.plan.tables import PRICES, THROUGHPUT, MachineConfig, PricesConfig, ThroughputConfig
from recipes.plan.text import render
from recipes.plan.throughput import Throughput, measured, published, told
from recipes.watch.files import replace_text

IMAGENET = Images(1_281_167, 50_000, "ImageNet-1K's, since {} is not here")
EXAMPLES = """examples:
  %(prog)s yamls/p3.yaml
  %(prog)s yamls/p3.yaml max_duration=16ep \\
      algorithms.progressive_resizing=off
  %(prog)s yamls/mosaic-medium.yaml --memory \\
      --machine p4d.24xlarge
  %(prog)s yamls/g5.yaml --images-per-second 3000
  %(prog)s yamls/p3.yaml --measured runs/p3-trial

Prices stand in recipes/plan/prices.yaml, published throughput in
recipes/plan/throughput.yaml, each with its source."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        InputError: The arguments make no sense.
    """
    parser = command_parser("plan", "Tell a run's stages, compute, time and price before anyone pays.", EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="YAML [key=value ...]", help="the config, and keys that differ")
    parser.add_argument("--machine", metavar="NAME", help="one of the price list (default: the YAML's `# Hardware:`)")
    parser.add_argument("--prices", type=Path, default=PRICES, metavar="FILE", help="the price list")
    parser.add_argument("--devices", type=int, metavar="N", help="processes (default: the machine's devices)")
    parser.add_argument(
        "--images", type=int, nargs=2, metavar=("TRAIN", "VAL"), help="how many (default: those at data.path)"
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="RUN",
        help="take the throughput of this run's folder (default: runs_folder/run_name, if that has been measured)",
    )
    parser.add_argument("--images-per-second", type=float, metavar="N", help="of plain training at 224 px, all devices")
    parser.add_argument("--memory", action="store_true", help="build the network: memory, and FLOPs instead of area")
    parser.add_argument("--json", action="store_true", help="print JSON, and write no files")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for plan.html and schedule.png (default: runs_folder/run_name/plan)"
    )
    given = parser.parse_intermixed_args(list(argv))
    given.yaml, given.overrides = yaml_and_overrides(parser, given.words)
    for name, value in (("--devices", given.devices), ("--images-per-second", given.images_per_second)):
        if value is not None and not 0 < value < math.inf:
            parser.error(f"argument {name}: got {value:g}; allowed: above 0")
    if given.images is not None and min(given.images) < 1:
        parser.error(f"argument --images: got {given.images[0]} {given.images[1]}; allowed: at least 1 each")
    if given.images_per_second is not None and given.measured is not None:
        parser.error("--images-per-second and --measured are two answers to one question; give one")
    return given


def find_machine(
    given: str | None, hardware: str, prices: PricesConfig, path: Path
) -> tuple[str | None, MachineConfig | None]:
    """The machine that is named on the command line, or in the recipe's comment.

    Raises:
        InputError: The price list has no such machine.
    """
    if given is not None and given not in prices.machines:
        raise InputError(f"--machine: {given!r} is not in {path}; allowed: {', '.join(prices.machines)}")
    words = set(re.findall(r"[\w.-]+", hardware))
    name = given or next((name for name in prices.machines if name in words), None)
    return name, prices.machines[name] if name else None


def device_of(hardware: str, machine: MachineConfig | None) -> tuple[str, int]:
    """Kind and number of devices: the machine's, else those of `8x A100` in the recipe's comment, else one."""
    if machine is not None:
        return machine.device, machine.devices
    found = re.search(r"(\d+)x (\S+)", hardware)
    return (found[2], int(found[1])) if found else (hardware, 1)


def count_images(config: RunConfig, given: Sequence[int] | None) -> tuple[Images, int]:
    """The images of the dataset, and its classes; ImageNet-1K's where it is not on this machine.

    Raises:
        DataError: The dataset is here, and cannot be used.
    """
    path, most = config.data.path, config.data.train_samples
    if given is not None:
        images, classes = Images(given[0], given[1], "given: --images"), 1000
    elif is_remote(path) or not Path(path).exists():
        images, classes = IMAGENET._replace(source=IMAGENET.source.format(path)), 1000
    else:
        train, val = open_split_pair(path, config.data.cache_folder)
        images, classes = Images(len(train), len(val), f"counted in {path}"), len(train.classes)
    if most is not None and most < images.train:
        images = images._replace(train=most, source="data.train_samples")
    return images, config.model.num_classes or classes


def find_throughput(
    given: argparse.Namespace, config: RunConfig, device: str, devices: int, table: ThroughputConfig
) -> Throughput | None:
    """What is known best: told, measured by the run that is named or by this one, published.

    Raises:
        InputError: The run that is named holds no figures.
    """
    if given.images_per_second is not None:
        return told(given.images_per_second)
    if given.measured is not None:
        return measured(given.measured)
    own = Path(config.runs_folder) / config.run_name
    if (own / "metrics.jsonl").is_file():
        try:
            return measured(own)
        except InputError:
            pass  # it has hardly begun
    return published(config, device, devices, table)


def plan_of(given: argparse.Namespace, config: RunConfig) -> Plan:
    """The plan of a command line.

    Raises:
        InputError: Something named does not exist or does not go together.
        DataError: The dataset is here, and cannot be used.
    """
    prices, table = load_table(given.prices, PricesConfig), load_table(THROUGHPUT, ThroughputConfig)
    hardware = hardware_of(given.yaml)
    name, machine = find_machine(given.machine, hardware, prices, given.prices)
    device, devices = device_of(hardware, machine)
    if given.machine is not None:
        hardware = f"{devices}x {device} ({name})"
    devices = given.devices or devices
    images, classes = count_images(config, given.images)
    work: Callable[[int], float] = by_area
    work_name, memory = "area", dict[Stage, float]()
    if given.memory:
        if sys.stderr.isatty():
            print("loading torch and Composer, building the network ...", file=sys.stderr)
        from recipes.model import planned_network
        from recipes.plan.network import memory_gb, work_of

        network = planned_network(config, classes)
        memory = memory_gb(network, config, plan_stages(config, images.train, devices), devices)
        work, work_name = work_of(network), "FLOPs"
    return make_plan(
        config,
        images=images,
        hardware=hardware,
        machine_name=name,
        machine=machine,
        machines=tuple(prices.machines),
        devices=devices,
        throughput=find_throughput(given, config, device, devices, table),
        work=work,
        work_name=work_name,
        memory_gb=memory,
    )


def write(plan: Plan, config: RunConfig, folder: Path) -> None:
    """Leave plan.html and schedule.png in a folder.

    Raises:
        InputError: It cannot be written.
    """
    from recipes.page.chart import chart, save, svg
    from recipes.plan.draw import draw
    from recipes.plan.page import plan_page

    with chart(9, 8) as figure:
        draw(figure, config, [part.stage for part in plan.stages], plan.images.train, plan.devices)
        try:
            save(figure, folder / "schedule.png")
            replace_text(folder / "plan.html", plan_page(plan, svg(figure, "the run's schedule")))
        except OSError as error:
            raise InputError(f"{folder}: cannot be written: {error.strerror or error}; see --out") from None


def main(argv: Sequence[str]) -> int:
    """Print the plan, then leave its page; returns the exit status."""
    given = parse(argv)
    config = load_config(given.yaml, given.overrides)
    plan = plan_of(given, config)
    if given.json:
        print(to_json(as_json(plan), indent=2))
        return 0
    console = Console(highlight=False, markup=False, emoji=False)  # a path may hold [brackets]
    for part in render(plan):
        console.print(part)
    sys.stdout.flush()  # the picture takes a second more
    folder = given.out or Path(config.runs_folder) / config.run_name / "plan"
    write(plan, config, folder)
    print(f"picture: {folder / 'schedule.png'}\npage: {folder / 'plan.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
