"""How fast the playground answers, in headless Chromium; and the pictures of it on the pages.

    make playground                                      or only its parts: the data, npm ci
    python bench/playground.py > results/playground.json
    python bench/playground.py --pictures                also writes images/playground*.png, of a
                                                         model with a sketcher

For blocks of several sizes: milliseconds from the mouse's last movement until the answer is drawn,
and CPU time of the whole browser for each. Needs playwright and Chromium (requirements-test.txt).
"""

import argparse
import functools
import http.server
import json
import pathlib
import shutil
import statistics
import sys
import threading

import psutil
import torch
from playwright.sync_api import sync_playwright

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from support.results import provenance  # noqa: E402

REPEATS = 20
SIDES = (1, 3, 4, 6)  # of square blocks, in patches
# The time from the last movement, whose event waits while the model runs, until the words change.
TIMER = """() => {
    window.times = [];
    let moved;
    addEventListener("pointermove", event => { moved = event.timeStamp; }, true);
    const summary = document.getElementById("summary");
    new MutationObserver(() => {
        if (summary.textContent.includes("Answered in")) times.push(performance.now() - moved);
    }).observe(summary, {childList: true});
}"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *arguments):
        pass


def cpu_seconds():
    """CPU time of this process's children: the browser."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.Error:  # it has just ended
            pass
    return total


def open_page(browser, address, size, scheme="light"):
    """The page in a window of its own, once it has answered."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme,
                            device_scale_factor=1)
    page.goto(address)
    page.locator("#summary", has_text="Answered in").wait_for()
    return page


def drag(page, patches):
    """Drag the block by so many patches to the right, or left, and wait for the answer."""
    box, before = page.locator("#block").bounding_box(), page.evaluate("window.times.length")
    width = page.locator("#image").bounding_box()["width"]
    columns = int(page.get_attribute("#width", "max")) + 1
    x, y = box["x"] + box["width"] / 3, box["y"] + box["height"] / 3
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + patches * width / columns, y)
    page.mouse.up()
    page.wait_for_function("before => window.times.length > before", arg=before)


def measure(page):
    """For each side of a block: median and slowest answer, CPU time an answer; milliseconds."""
    page.evaluate(TIMER)
    found = {}
    for side in SIDES:
        for name in ("row", "column"):
            page.fill(f"#{name}", "1")
        for name in ("height", "width"):
            page.fill(f"#{name}", str(side))
        drag(page, 1)
        start = cpu_seconds()
        page.evaluate("window.times = []")
        for i in range(REPEATS):
            drag(page, 1 if i % 2 else -1)
        times = page.evaluate("window.times")
        found[f"{side} x {side} patches"] = {
            "median_ms": statistics.median(times), "slowest_ms": max(times), "answers": len(times),
            "cpu_ms": 1000 * (cpu_seconds() - start) / REPEATS}
    return found


def draw(browser, address):
    """Write images/playground.png, and the same on a phone in the dark."""
    page = open_page(browser, address, (1000, 800))
    page.get_by_role("button", name="Example 11").click()
    page.locator("#image[aria-label^='Example 11']").wait_for()
    page.wait_for_timeout(2000)
    page.get_by_role("button", name="Sketch", exact=True).click()
    page.get_by_role("img", name="Sketch 8").wait_for()
    page.locator("main").screenshot(path=ROOT / "images/playground.png")
    page = open_page(browser, address, (390, 844), "dark")
    page.screenshot(path=ROOT / "images/playground_phone.png")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--pictures", action="store_true", help="write images/playground*.png, too")
    arguments = p.parse_args()
    handler = functools.partial(Handler, directory=ROOT / "playground")
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_port}/"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        about = json.loads((ROOT / "playground/built/about.json").read_text())
        results = {"facts": about["facts"], "blocks": measure(
            open_page(browser, address, (1000, 800))), "browser": browser.version,
            "load": psutil.getloadavg()[0], **provenance(torch.device("cpu"))}
        if arguments.pictures:
            draw(browser, address)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
