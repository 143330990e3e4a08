"""EC2's notice that a spot instance will be taken back, two minutes ahead."""

from __future__ import annotations

import json
import logging
import threading
import urllib.error
import urllib.request

from recipes.checkpoints.interrupt import Interrupt

log = logging.getLogger(__name__)

_EVERY = 5.0
_TIMEOUT = 2.0
_TOKEN_SECONDS = 21600
GRACE = 100.0
"""Seconds from a notice, which comes two minutes ahead, until the process should be gone."""

# Never through a proxy: the address is the machine's own.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class SpotNotices:
    """Asks the instance's metadata (IMDSv2) in the background, and requests an interrupt when a notice is there.

    Source: "Spot Instance interruption notices" in the EC2 user guide: `spot/instance-action` answers 404 until then.

    Args:
        address: Of the metadata service, such as `http://169.254.169.254`.
        interrupt: What to tell.
        every: Seconds between two questions.
    """

    def __init__(self, address: str, interrupt: Interrupt, every: float = _EVERY) -> None:
        self._address = address.rstrip("/")
        self._interrupt = interrupt
        self._every = every
        self._stop = threading.Event()
        self._token: str | None = None

    def start(self) -> None:
        """Begin to ask."""
        threading.Thread(target=self._run, name="spot notices", daemon=True).start()

    def close(self) -> None:
        """Ask no more."""
        self._stop.set()

    def _run(self) -> None:
        silent = False
        while not self._stop.wait(self._every):
            try:
                notice = self._ask()
                silent = False
            except (OSError, ValueError) as error:
                if not silent:
                    log.warning(
                        "%s does not answer, no notice of a spot interruption will be seen: %s", self._address, error
                    )
                silent = True
                continue
            if notice is not None:
                log.warning("EC2 will take this instance back: %s", notice)
                self._interrupt.request(f"EC2 spot notice: {notice}", GRACE)
                return

    def _ask(self) -> str | None:
        """The notice's text, or None."""
        try:
            if self._token is None:
                self._token = self._get("PUT", "api/token", "X-aws-ec2-metadata-token-ttl-seconds", str(_TOKEN_SECONDS))
            text = self._get("GET", "meta-data/spot/instance-action", "X-aws-ec2-metadata-token", self._token)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            self._token = None  # 401: it has expired
            raise
        notice = json.loads(text)
        return f"{notice.get('action')} at {notice.get('time')}" if isinstance(notice, dict) else None

    def _get(self, method: str, path: str, header: str, value: str) -> str:
        request = urllib.request.Request(f"{self._address}/latest/{path}", method=method, headers={header: value})
        with _open(request, timeout=_TIMEOUT) as answer:
            text: bytes = answer.read(65536)
        return text.decode()
