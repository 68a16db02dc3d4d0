#!/usr/bin/env python
"""Photograph the report of a run in headless Chromium: the picture of the README and of docs/report.md.

    idefics-sft train quickstart data.validation.share=0.02 checkpoints.every_steps=80
    idefics-sft select runs/quickstart
    scripts/make_screenshot.py runs/quickstart docs/images/report.png

Needs chromium and chromedriver (scripts/install_chromium). --width, --height and --scheme take other pictures.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

from sft.report import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1440)
    parser.add_argument("--height", type=int, default=1460)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--at", default="", help="the section to begin with: checkpoints, answers, loss, data, …")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = report(arguments.run, Path(folder) / "report.html")
        picture = photograph(page, arguments.width, arguments.height, arguments.scheme, arguments.at)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.picture, optimize=True)
    print(f"{arguments.picture}: {picture.width}x{picture.height}, {arguments.picture.stat().st_size / 1024:.0f} KiB")


def photograph(page: Path, width: int, height: int, scheme: str, section: str) -> Image.Image:
    """The upper part of the page, or what can be seen from a section on."""
    options = webdriver.ChromeOptions()
    options.binary_location = _find("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(_find("chromedriver"))) as browser:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(page.as_uri() + (f"#{section}" if section else ""))
        return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")


def _find(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise SystemExit(f"{program} is not here; run scripts/install_chromium")
    return found


if __name__ == "__main__":
    main()
