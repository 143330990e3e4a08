"""`python -m recipes.report RUN [RUN ...] [--output FILE]`."""

from __future__ import annotations

import sys
from pathlib import Path

from data.text import escape
from recipes.cli import command_parser, run_command

EXAMPLES = """examples:
  %(prog)s runs/demo
      writes runs/demo/report.html anew
  %(prog)s runs/p3 runs/p3-no-mixup
      compares them in ./report.html
  %(prog)s runs/* --output /tmp/all.html"""


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status.

    Raises:
        InputError: A folder is no run's, or the page cannot be written.
    """
    parser = command_parser(
        "report",
        "Write one self-contained page about a run, or about several side by side:\n"
        "what was trained, curves, throughput, where the time went, accuracy, pictures,\n"
        "confusions and errors. A run need not be finished.",
        EXAMPLES,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, such as runs/demo")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page; without it, report.html in the run's folder, or in this one for several runs",
    )
    given = parser.parse_args(argv)
    # Only now: --help needs no charts.
    from recipes.report.page import REPORT, write_report

    folders = list(dict.fromkeys(given.runs))
    output = given.output or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    write_report(folders, output)
    print(f"report: {escape(output)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
