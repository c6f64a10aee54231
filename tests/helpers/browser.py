"""The demo page, served by the command itself, in headless Chromium."""

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cores import all_cores
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

_ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1280,900"),
]


def find_chromium() -> tuple[str, str] | None:
    """Chromium and its driver, if both are installed."""
    found = shutil.which("chromium"), shutil.which("chromedriver")
    return None if None in found else found


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def process_environment(**others: str) -> dict[str, str]:
    """Variables that share the tests' compilation cache, but enable optimizations."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        **others,
    }


@contextlib.contextmanager
def running_demo(folder: Path, *arguments: str, stop: int = signal.SIGINT) -> Iterator[str]:
    """Serves a page with `sam-jax demo`, yields its address, and ends it with the signal `stop`.

    Checks that the server leaves no temporary files; they would be in the folder.
    """
    port = free_port()
    command = [sys.executable, "-m", "sam_jax.cli", "demo", "--port", str(port), *arguments]
    log, temporary = folder / "log", folder / "temporary"
    temporary.mkdir()
    with all_cores(), open(log, "w") as file:
        process = subprocess.Popen(
            command,
            env=process_environment(TMPDIR=str(temporary)),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(1200):
            if "The model is compiled" in log.read_text():
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        else:
            pytest.fail(f"the page was not ready in two minutes: {log.read_text()}")
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(stop)
        assert process.wait(30) == 130
        assert log.read_text().endswith("sam-jax: stopped\n")
        assert "Traceback" not in log.read_text()
        assert not [path for path in temporary.iterdir() if "sam_jax" in path.name]
    finally:
        process.kill()
        process.wait()


def open_browser(folder: Path, phone: bool = False) -> webdriver.Chrome:
    """Starts Chromium with a new profile, as on a phone if asked; it saves files in the folder."""
    binary, driver = find_chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (*_ARGUMENTS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if phone:
        screen = {"width": 390, "height": 844, "pixelRatio": 2}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": screen})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


class Page:
    """A tab of the browser that shows the page."""

    def __init__(self, browser, address, folder):
        self.browser, self.folder = browser, folder
        browser.switch_to.new_window("tab")
        self.window = browser.current_window_handle
        browser.get(address)
        self.find("#drop")

    def front(self):
        self.browser.switch_to.window(self.window)

    def find(self, css):
        return WebDriverWait(self.browser, 60, 0.02).until(
            lambda browser: browser.find_element(By.CSS_SELECTOR, css)
        )

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition):
        return WebDriverWait(self.browser, 60, 0.02).until(lambda _: condition())

    def layer(self):
        """The area of the mask as displayed."""
        url = self.find(".stage .mask").get_attribute("src")
        if not url:
            return None
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        return np.asarray(image.convert("RGBA"))[..., 3] > 0

    @contextlib.contextmanager
    def change(self):
        """Waits until another mask is displayed."""
        self.front()
        before = self.find(".stage .mask").get_attribute("src")
        yield
        self.wait(lambda: self.find(".stage .mask").get_attribute("src") != before)

    def mouse(self, *places, button="click"):
        """Clicks at a place, from 0 to 1 along the image's sides, or drags between two."""
        stage = self.find(".stage")
        width, height = stage.size["width"], stage.size["height"]
        offsets = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in places]
        actions = ActionChains(self.browser, duration=0)
        actions.move_to_element_with_offset(stage, *offsets[0])
        if len(offsets) == 1:
            getattr(actions, button)()
        else:
            actions.click_and_hold()
            for offset in offsets[1:]:
                actions.move_to_element_with_offset(stage, *offset)
            actions.release()
        actions.perform()

    def press(self, name):
        self.run("document.getElementById(arguments[0]).click()", name)

    def keys(self, *keys):
        """Presses keys where the focus is; Shift is held until `Keys.NULL`."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def choose(self, path):
        """Opens a file with the button; waits until it is shown."""
        self.front()
        before = self.find(".stage .image").get_attribute("src")
        self.find("#file").send_keys(str(path))
        self.wait(lambda: self.find(".stage .image").get_attribute("src") != before)

    def error(self):
        """The displayed error message."""
        alert = self.find("#alert")
        return alert.text if alert.is_displayed() else ""

    def set_points_per_side(self, points):
        self.run(_SET_POINTS_PER_SIDE, str(points))

    def saved(self):
        """The files that the two buttons save: the PNG's image, the JSON, and the file names."""
        self.front()
        files = []
        for kind in ("png", "json"):
            for old in self.folder.glob(f"*.{kind}"):
                old.unlink()
            self.find(f"#{kind}").click()
            self.wait(lambda kind=kind: list(self.folder.glob(f"*.{kind}")))
            files += self.folder.glob(f"*.{kind}")
        with Image.open(files[0]) as image:
            image.load()
        return image, json.loads(files[1].read_text()), [file.name for file in files]

    def drop(self, path):
        """Drops a file on the page; waits until it is shown."""
        self.front()
        before = self.find(".stage .image").get_attribute("src")
        self.run(_DROP, base64.b64encode(path.read_bytes()).decode(), path.name)
        self.wait(lambda: self.find(".stage .image").get_attribute("src") != before)


_SET_POINTS_PER_SIDE = """
const side = document.getElementById("side");
side.value = arguments[0];
side.dispatchEvent(new Event("input", {bubbles: true}));
"""
_DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], arguments[1], {type: "image/jpeg"}));
const event = new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
document.querySelector("main").dispatchEvent(event);
"""
