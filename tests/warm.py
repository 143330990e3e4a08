"""`python warm.py SOCKET`: imports torch, Composer and the project once, then forks a process for each command.

A command has a process of its own, with the session, environment, signals, exit status and end that `python COMMAND`
has. Only the imports, some eight CPU seconds, are shared.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

from recipes.cli import quick_imports

IMPORTED = ["recipes.run", "recipes.accuracy", "recipes.trained", "recipes.report.page", "recipes.find_lr.range_test"]


def main():
    with quick_imports():  # which also keeps collections in a command's process from copying what all of them share
        for name in IMPORTED:
            importlib.import_module(name)
    requests = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the parents
    while True:
        request, files, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not request:  # the tests have ended
            return
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, answers = files
    if child := os.fork():  # this process is the parent, which tells the tests what only a parent learns
        with socket.socket(fileno=answers) as told:
            told.send(child.to_bytes(8, "big"))
            told.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]).to_bytes(8, "big", signed=True))
        os._exit(0)
    os.close(answers)
    requests.close()
    run(*json.loads(request), streams)


def run(words, environment, streams):
    """What `python WORDS` does, from the environment and the standard streams on."""
    os.setsid()
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    if encoding := environment.get("PYTHONIOENCODING"):  # which Python itself reads as it starts
        sys.stdout.reconfigure(encoding=encoding, errors="strict")
        sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
    sys.path[0] = str(Path.cwd() if words[0] in ("-c", "-m") else Path(words[0]).parent)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
