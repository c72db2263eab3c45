"""A headless Chromium for the tests: what a page looks like, and where on it things lie."""

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# None of it may reach for the network, or for what another run left.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--force-device-scale-factor=1", "--force-color-profile=srgb",
)  # fmt: skip


def find() -> str:
    """The browser's path; fails the test, and says what to do, where there is none."""
    for name in filter(None, (os.environ.get("CHROMIUM"), *_NAMES)):
        if path := shutil.which(name):
            return path
    pytest.fail("no browser was found: run scripts/browser, or apt-get install chromium, or set CHROMIUM to one")


def run(page: Path, *options: str, size: tuple[int, int], dark: bool = False) -> str:
    """Opens a page; returns what the browser prints.

    Args:
        page: An HTML file.
        *options: Of Chromium.
        size: Width and height of the window.
        dark: Whether the reader prefers dark pages.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            find(), *_FLAGS, f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}", *options, page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(page: Path, size: tuple[int, int], dark: bool = False) -> np.ndarray:
    """What the page looks like, ``[height, width, 3]``."""
    target = page.with_suffix(".png")
    target.unlink(missing_ok=True)
    run(page, f"--screenshot={target}", size=size, dark=dark)
    with PIL.Image.open(target) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[:2] == size[::-1]
    return pixels


def measured(page: Path, script: str, size: tuple[int, int]) -> Any:
    """What an expression of JavaScript is on the page, by way of JSON."""
    probe = f"<script>document.body.dataset.measured = JSON.stringify({script})</script>"
    copy = page.with_name(f"{page.stem}-measured.html")
    copy.write_text(page.read_text("utf-8").replace("</body>", f"{probe}</body>"), "utf-8")
    found = re.search(r'data-measured="([^"]*)"', run(copy, "--dump-dom", size=size))
    assert found, "the page did not say what was asked"
    return json.loads(html.unescape(found[1]))
