"""The page as people see it: opened in Chromium, at a desk and on a phone, light and dark, without scripts."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import artifact, audited, certificate, layer, measurement, write

from reparam_export.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
INSTALL = ("apt-get", "-o", "DPkg::Lock::Timeout=600", "-qq")


def browser() -> str:
    """A Chromium of this machine, installed with apt-get where that can be done; there is no test without one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), os.environ.get("CHROMIUM"))
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        for words in (("update",), ("install", "-y", "chromium")):
            subprocess.run([*INSTALL, *words], check=True, capture_output=True, timeout=900)
        found = shutil.which("chromium")
    if found is None:
        pytest.fail("no Chromium: install the package chromium (or Chrome), or name one in CHROMIUM")
    return found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = tuple(layer(f"blocks.{index}.attn.proj") for index in range(12))
    engine = audited(artifact(path="model.engine", target="trt", ran=False, outputs=()))
    folder = tmp_path_factory.mktemp("browser")
    write(folder, proof=certificate(layers=layers), artifacts=[artifact(), engine], latency=measurement())
    return write_report(folder).html


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], ids=lambda p: f"{p[0]}-{p[1]}")
def page(request: pytest.FixtureRequest, chromium: Any, report: Path) -> Iterator[Any]:
    """The page in one of its four forms; scripts are off, and every request it makes is counted."""
    width, scheme = request.param
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=False
    )
    opened = context.new_page()
    opened.requests, opened.scheme = [], scheme
    opened.on("request", lambda sent: opened.requests.append(sent.url))
    opened.goto(report.as_uri())
    yield opened
    context.close()


def test_verdict_tables_and_plots_are_there(page: Any) -> None:
    verdicts = page.locator("header .verdict:visible").all_inner_texts()
    assert [text.strip().split(":")[0] for text in verdicts] == ["Proven", "Latency proven"]
    section = page.locator("#latency")
    assert section.locator("h2 .state").inner_text() == "no added cost"
    captions = section.locator("table:visible caption").all_inner_texts()
    assert [caption.split(":")[0].split(",")[0] for caption in captions] == [
        "Ratios of run times",
        "Samples a second",
        "Run times of all rounds",
        "Base",
    ]
    for name in ("Ratios", "Throughput", "Run times", "Structure"):
        assert section.get_by_role("region", name=name, exact=True).is_visible()
    throughput = section.get_by_role("region", name="Throughput").locator("tbody tr")
    assert throughput.count() == 6
    assert "onnxruntime, CPU, batch 16" in throughput.nth(2).inner_text()
    plots = section.locator("figure svg:visible")
    assert plots.count() == 2
    for number in range(2):
        box = plots.nth(number).bounding_box()
        assert box["width"] > 250
        assert box["height"] > 200
    assert section.get_by_text("EPYC <7B13>").is_visible()


def test_nothing_is_fetched_and_nothing_sticks_out(page: Any) -> None:
    assert len(page.requests) == 1
    width = page.viewport_size["width"]
    for selector in ("section", "figure", ".verdict", ".scroll", "dl.facts"):
        for box in (found.bounding_box() for found in page.locator(f"{selector}:visible").all()):
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width + 0.5, selector


def test_the_page_is_dark_where_that_is_preferred_and_its_words_stand_out(page: Any) -> None:
    from PIL import Image

    shot = Image.open(io.BytesIO(page.locator("#latency > p").first.screenshot())).convert("L")
    background = shot.getpixel((shot.width - 1, shot.height - 1))
    darkest, lightest = shot.getextrema()
    assert (background < 60) == (page.scheme == "dark")
    assert background in (darkest, lightest)
    assert lightest - darkest > 100
