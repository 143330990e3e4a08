"""Signals and notices that ask a run to stop."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from data.errors import DataError, InputError
from recipes.checkpoints.interrupt import Interrupt, watch_spot_notices
from tests.recipes.checkpoints.tiny import At, same
from tests.support import wait_for

_CHILD = """
import sys
from recipes.checkpoints.interrupt import Interrupt
interrupt = Interrupt()
interrupt.install()
print("ready", flush=True)
for line in sys.stdin:
    print(interrupt.reason, flush=True)
sys.exit(75)
"""


def test_sigterm_of_composers_launcher_after_a_ctrl_c_changes_nothing_and_a_second_ctrl_c_exits_at_once():
    with subprocess.Popen([sys.executable, "-c", _CHILD], stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "ready\n"

        def reason():
            print("?", file=process.stdin, flush=True)
            return process.stdout.readline().strip()

        process.send_signal(signal.SIGINT)
        wait_for(lambda: reason() == "SIGINT")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert reason() == "SIGINT"
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 128 + signal.SIGINT


def test_a_signal_ends_a_run_after_its_step_and_it_resumes_to_the_same_weights(tiny, untouched):
    for number, batch in ((signal.SIGTERM, 6), (signal.SIGINT, 9)):

        def send(state, number=number):
            tiny.interrupt.install()
            os.kill(os.getpid(), number)

        stop = tiny.go(At("before_forward", batch, send))
        assert stop.status == 75
        assert signal.Signals(number).name in str(stop)
        assert tiny.stems()[-1] == f"ep001-ba{batch + 1:06d}"
    assert same(tiny.go(), untouched)


def test_a_loader_that_gives_nothing_ends_a_run_between_two_steps(tiny, untouched):
    for event, stem in [
        ("before_dataloader", "ep000-ba000001"),
        ("before_dataloader", "ep000-ba000005"),  # an epoch's last answer is that there is no more
        ("epoch_start", "ep001-ba000005"),
        ("before_dataloader", "ep002-ba000014"),
    ]:
        stop = tiny.go(At(event, int(stem[-6:]), lambda state: tiny.checkpoints.gate(False, "worker 3 hangs")))
        assert stop.status == 75
        assert "worker 3 hangs" in str(stop)
        assert tiny.find().manifest.stem == stem
    assert same(tiny.go(), untouched)


def test_data_that_cannot_be_used_any_more_ends_a_run_with_its_state_saved(tiny, untouched):
    gone = DataError("/data/train/a/1.jpg and 100 images drawn as replacements cannot be decoded")
    for batch, stem in ((0, None), (3, "ep000-ba000003"), (12, "ep002-ba000012")):
        with pytest.raises(InputError) as ended:
            tiny.go(At("before_dataloader", batch, lambda state: tiny.checkpoints.gate(True, gone)))
        where = f"{stem} saved in {tiny.places.local}; run the same command to resume"
        assert ended.value.lines == (*gone.lines, *([where] if stem else []))
        assert [*tiny.stems(), None][-1 if stem is None else -2] == stem
    assert same(tiny.go(), untouched)
    assert tiny.resume.manifest.batch == 12


class Metadata(http.server.BaseHTTPRequestHandler):
    """EC2's instance metadata, version 2."""

    def do_PUT(self):
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200, "token")

    def do_GET(self):
        self.server.asked += 1
        if self.headers["X-aws-ec2-metadata-token"] != "token":
            self._answer(401, "")
        elif self.path != "/latest/meta-data/spot/instance-action" or self.server.notice is None:
            self._answer(404, "")
        else:
            self._answer(200, self.server.notice)

    def _answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def metadata():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.notice, server.asked = None, 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()


def watch(address, interrupt):
    threading.Thread(target=watch_spot_notices, args=(address, interrupt, 0.02), daemon=True).start()


def test_a_spot_notice_asks_for_a_stop_with_its_two_minutes(metadata):
    interrupt = Interrupt()
    watch(f"http://127.0.0.1:{metadata.server_port}", interrupt)
    for other in (None, "no JSON", "[]"):
        metadata.notice, metadata.asked = other, 0
        wait_for(lambda: metadata.asked > 3)
        assert not interrupt.requested
    metadata.notice = '{"action": "terminate", "time": "2026-11-23T20:00:00Z"}'
    wait_for(lambda: interrupt.requested)
    assert "terminate at 2026-11-23T20:00:00Z" in interrupt.reason
    assert 60 < interrupt.seconds_left() <= 110


def test_where_nobody_answers_it_says_so_once(caplog):
    interrupt = Interrupt()
    watch("http://127.0.0.1:9", interrupt)
    wait_for(lambda: "does not answer" in caplog.text)
    time.sleep(0.1)
    assert caplog.text.count("does not answer") == 1
    assert not interrupt.requested
    interrupt.request("the test is over", 0.0)
