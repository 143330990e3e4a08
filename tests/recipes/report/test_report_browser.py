"""The page in a real browser without a network: no error on the console, nothing fetched, nothing beyond the edge."""

import json
import os
import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from recipes.report.page import write_report
from tests.recipes.report.folder import write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = "headless no-sandbox disable-gpu disable-dev-shm-usage no-first-run disable-background-networking "
FLAGS += "disable-component-update disable-sync"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, with its log of requests and of the console."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        reason = "needs Chromium and chromedriver (Debian: chromium, chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    folder = f"user-data-dir={tmp_path_factory.mktemp('browser')}"
    for flag in (*FLAGS.split(), "host-resolver-rules=MAP * ~NOTFOUND", folder):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, photos):
    """A page of one run and one of two, the second with a hostile name and one damaged file."""
    root = tmp_path_factory.mktemp("pages")
    one, two = write_run(root / "one", photos), write_run(root / "two", photos, epochs=6)
    write_report([one], root / "one.html")
    summary = json.loads((two / "summary.json").read_text())
    name = "</title><script>throw 1</script><img src=x onerror='throw 2'>" + "x" * 200
    (two / "summary.json").write_text(json.dumps(summary | {"run_name": name}))
    (two / "predictions.npz").write_bytes(b"PK")
    write_report([one, two], root / "two.html")
    return root


def requests(browser):
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("chrome://")]


@pytest.mark.parametrize(("name", "width"), [("one.html", 1200), ("two.html", 400)])
def test_offline(browser, pages, name, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    browser.get("about:blank")  # the page of a new tab fetches parts of its own
    browser.get_log("performance"), browser.get_log("browser")
    page = Path(pages / name).as_uri()
    browser.get(page)
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    assert browser.get_log("browser") == []
    fetched = requests(browser)
    assert fetched[0] == page
    assert all(url.startswith("data:") for url in fetched[1:])
    wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert inner == width
    assert wide <= inner
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    assert browser.execute_script("return document.querySelectorAll('script, [onerror]').length") == 0


def test_pictures_are_pictures_and_charts_are_labelled(browser, pages):
    browser.get((pages / "one.html").as_uri())
    widths = browser.execute_script("return [...document.images].map(one => one.complete && one.naturalWidth)")
    assert len(widths) == 4
    assert all(widths)
    shown = browser.execute_script("return [...document.querySelectorAll('svg text')].map(one => one.textContent)")
    for label in ("epochs", "training loss", "learning rate", "momentum", "top-1 (%)", "images/s", "loader wait (%)"):
        assert label in shown
    assert "time (min)" in shown or "time (h)" in shown
    assert "24 px, batch 32" in shown
    overlapping = browser.execute_script(OVERLAPS)
    assert overlapping == []


OVERLAPS = """
const found = [];
for (const chart of document.querySelectorAll('svg')) {
    const texts = [...chart.querySelectorAll('text')].map(one => [one.textContent, one.getBoundingClientRect()]);
    for (const [i, [a, p]] of texts.entries())
        for (const [b, q] of texts.slice(i + 1))
            if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3)
                found.push(a + ' / ' + b);
}
return found;
"""
