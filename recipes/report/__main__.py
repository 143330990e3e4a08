"""`python -m recipes.report RUN [RUN ...] [--output FILE]`: write a page about runs."""

from __future__ import annotations

import sys
from pathlib import Path

from data.text import escape
from recipes.cli import command_parser, run_command

DESCRIPTION = """Write one self-contained page about a run, or about several side by side:
what was trained, curves, throughput, where the time went, accuracy, pictures,
confusions and errors. A run need not be finished."""
EXAMPLES = """examples:
  %(prog)s runs/demo
      writes runs/demo/report.html again
  %(prog)s runs/p3 runs/p3-no-mixup
      compares them in ./report.html
  %(prog)s runs/* --output /tmp/all.html"""


def main() -> int:
    """Write the page and print its path; returns the exit status."""
    parser = command_parser("report", DESCRIPTION, EXAMPLES, words=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, such as runs/demo")
    text = "the page (default: report.html in the run's folder, or in the current one for several runs)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=text)
    given = parser.parse_args()
    # Only now: --help does not need charts.
    from recipes.report.page import REPORT, write_report

    folders = list(dict.fromkeys(given.runs))
    output = given.output or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    write_report(folders, output)
    print(f"report: {escape(output)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
