"""Train: `composer entrypoint.py yamls/p3.yaml [key.path=value ...]`, or `python entrypoint.py ...` for one process."""

from __future__ import annotations

import os
import sys

from recipes.cli import list_configs, parse, quick_imports, run_command
from recipes.load import load_config


def main() -> int:
    """Train as the command line asks; returns the exit status."""
    arguments = parse(
        sys.argv[1:], "Train an image classifier from a YAML config, or resume its run.", "python entrypoint.py"
    )
    if arguments.list_configs or arguments.path is None:
        print(list_configs())
        return 0
    config = load_config(arguments.path, arguments.overrides)
    if arguments.show:
        from recipes.resolved import resolved

        print(resolved(config), end="")
        return 0
    # Hides torch's warning about what FixedBuckets (recipes/trainer.py) does on purpose; read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with quick_imports():  # only now: it takes seconds, and the answers above need none of it
        from recipes.run import run
    return run(config)


if __name__ == "__main__":
    sys.exit(run_command(main))
