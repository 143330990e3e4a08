"""`python hanging.py PATH [argument ...]`: the program on a disk that goes away.

The `HANG_AT`-th read of an image whose path holds the text in the file `PATH`, and every later one, never returns; only
the process of rank `HANG_RANK` and its workers count. It is the system's own read, of an empty pipe, which Python takes
up again after a signal.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

from data.imagefolder import ImageFolder
from entrypoint import main
from recipes.cli import run_command

if __name__ == "__main__":
    switch, nothing, read = Path(sys.argv.pop(1)), os.pipe()[0], ImageFolder.read

    def hanging_read(self, index):
        mine = os.environ.get("HANG_RANK", "0") == os.environ.get("RANK", "0")
        if mine and switch.exists() and switch.read_text() in self.name(index):
            with switch.with_suffix(".reads").open("ab") as reads:
                reads.write(b".")
            if switch.with_suffix(".reads").stat().st_size >= int(os.environ["HANG_AT"]):
                switch.with_suffix(".hangs").touch()
                os.read(nothing, 1)
        return read(self, index)

    ImageFolder.read = hanging_read
    sys.exit(run_command(main))
