"""TensorBoard's pages of a tiny run, in a browser that reaches localhost only."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fastnst.config import load_config
from fastnst.run_log.writer import RunLog, log_visualization
from fastnst.training.train import train

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

STEPS = 4
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--disable-3d-apis",  # charts as SVG, which can be read, not on a canvas
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 60_000
"""Milliseconds until a page counts as broken, on a machine that is busy with other things."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, generated_photos: Path) -> Path:
    """A finished training run, and a sheet that was added to it afterwards."""
    small = ("data.image_size=32", "train.batch_size=2", "data.workers=1", "data.loader=pillow", "style.size=48")
    small += (
        f"train.steps={STEPS}",
        "train.log_every=1",
        "train.sample_every=2",
        "train.samples=1",
        "train.device=cpu",
    )
    options = {"data.folder": generated_photos, "style.image": generated_photos / "image_00.jpg", "loss.vgg": "random"}
    config = load_config(preset="vgg-conv3", assignments=small, options=options, environment={})
    out = tmp_path_factory.mktemp("runs") / "run"
    train(config, out)
    sheet = np.full((20, 30, 3), (200, 40, 40), dtype=np.uint8)
    log_visualization(out, {"visualize/deconvnet/sheet": sheet}, step=STEPS, text="**strongest** activations")
    return out


@pytest.fixture(scope="module")
def tensorboard(run: Path) -> Iterator[str]:
    """`fastnst tensorboard` on the run; its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastnst", "tensorboard", str(run), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://localhost:{port}"
        wait_for(f"{address}/data/plugin/scalars/scalars?tag=loss%2Ftotal&run=.", STEPS, process)
        wait_for(f"{address}/data/plugin/images/images?tag=visualize%2Fdeconvnet%2Fsheet&run=.&sample=0", 1, process)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def requests() -> list[str]:
    """The addresses that the pages asked for."""
    return []


@pytest.fixture(scope="module")
def page(tensorboard: str, requests: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator["Page"]:
    """TensorBoard's page with all its tabs."""
    from playwright.sync_api import sync_playwright

    browser = find_browser()
    with sync_playwright() as playwright:
        profile, size = tmp_path_factory.mktemp("browser"), {"width": 1400, "height": 1000}
        launch = playwright.chromium.launch_persistent_context
        context = launch(profile, executable_path=browser, args=list(FLAGS), viewport=size)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(tensorboard)
        yield page
        context.close()


@pytest.fixture
def tab(page: "Page") -> Callable[[str], "Page"]:
    """Open the tab of one of TensorBoard's plugins."""

    def open_tab(name: str) -> "Page":
        page.locator(f'[data-plugin-id="{name}"]').click()
        return page

    return open_tab


Tab = Callable[[str], "Page"]


def test_graphs_page_opens_from_blocks_to_layers(tab: Tab) -> None:
    page = tab("graphs")
    shown_from_the_bottom_up(page, "X_content", "transform_net", "vgg_transformed", "loss")
    shown_from_the_bottom_up(page, "X_content", "vgg_content", "loss")
    shown_from_the_bottom_up(page, "transform_net", "visualization")

    expand(page, "transform_net")
    layers = ("conv1", "conv2", "conv3", "res1", "res2", "res3", "res4", "res5", "up1", "up2", "out")
    shown_from_the_bottom_up(page, *(f"transform_net/{layer}" for layer in layers))
    expand(page, "transform_net/res1")
    expand(page, "transform_net/res1/conv1")
    for name in ("weight", "scale", "shift", "convolution", "instance_norm"):
        node(page, f"transform_net/res1/conv1/{name}")

    expand(page, "loss")
    for term in ("content", "style", "tv", "total"):
        node(page, f"loss/{term}")
    expand(page, "loss/style")
    node(page, "loss/style/relu3_1")
    expand(page, "visualization")
    node(page, "visualization/transform_net")
    node(page, "visualization/vgg_transformed")


def test_scalars_page_draws_charts(tab: Tab) -> None:
    page = tab("scalars")
    for tag in ("loss/total", "loss/content", "loss/style", "loss/tv"):
        chart = card(page, "scalar-card", tag)
        drawn(chart.locator("path.line, path.scatter"), corners=STEPS)


def test_time_series_page_draws_charts(tab: Tab) -> None:
    page = tab("timeseries")
    page.get_by_role("combobox", name="Filter tags (regex)").fill("^loss/total$")
    chart = page.locator("scalar-card").filter(has_text="loss/total").first
    drawn(chart.locator("line-chart svg path"), corners=STEPS)


def test_images_page_has_a_slider_over_steps(tab: Tab) -> None:
    page = tab("images")
    assert shown(card(page, "image-loader", "visualize/deconvnet/sheet")) == (30, 20)
    loader = card(page, "image-loader", "stylised/image_00")
    assert shown(loader) == (32, 32)
    loader.get_by_text("step 4").wait_for()
    slider = loader.locator("paper-slider")
    slider.focus()
    slider.press("Home")
    loader.get_by_text("step 0").wait_for()
    slider.press("ArrowRight")
    loader.get_by_text("step 2").wait_for()


def test_histograms_and_distributions_pages_draw_charts(tab: Tab) -> None:
    page = tab("histograms")
    for tag in ("conv1/weight", "conv1/scale", "conv1/shift"):
        chart = card(page, "histogram-loader", tag)
        chart.locator("g.histogram path").nth(2).wait_for(state="attached")
        assert chart.locator("g.histogram").count() == 3  # before the first step, after 2 and 4
        drawn(chart.locator("g.histogram path"), corners=20)
    page = tab("distributions")
    chart = card(page, "distribution-loader", "conv1/weight")
    drawn(chart.locator("path.area"), corners=3)


def test_custom_scalars_page_shows_all_loss_terms_in_one_chart(tab: Tab) -> None:
    page = tab("custom_scalars")
    charts = page.locator("tf-custom-scalar-multi-line-chart-card")
    charts.filter(has_text="all terms").get_by_text("Matches (4)").wait_for()
    charts.filter(has_text="content, by layer").get_by_text("Matches (1)").wait_for()
    charts.filter(has_text="style, by layer").get_by_text("Matches (4)").wait_for()


def test_hparams_page_shows_parameters_and_metrics(tab: Tab, tensorboard: str) -> None:
    page = tab("hparams")
    table = page.locator("tf-hparams-table-view")
    table.get_by_text("loss.content_weight").first.wait_for()
    table.get_by_text("loss/total").first.wait_for()
    page.locator("tf-hparams-query-pane").get_by_text("train.learning_rate").first.wait_for()
    with urllib.request.urlopen(f"{tensorboard}/data/runs", timeout=30) as response:
        assert json.load(response) == ["."]


def test_text_page_shows_configuration_and_visualizations(tab: Tab) -> None:
    page = tab("text")
    page.get_by_text('preset = "vgg-conv3"').wait_for()
    page.locator("strong", has_text="strongest").wait_for()


def test_pages_need_no_network(tab: Tab, requests: list[str], tensorboard: str) -> None:
    tab("scalars")
    assert requests
    foreign = [url for url in requests if not url.startswith((tensorboard, "data:", "blob:"))]
    assert foreign == []


def test_tensorboard_follows_both_files_of_a_run(run: Path, tensorboard: str) -> None:
    """Last, because it adds to the log that the pages show."""
    url = f"{tensorboard}/data/plugin"
    with RunLog(run, start_step=STEPS) as log:
        log.metrics(STEPS + 1, {"loss/total": 1.0})
        log.flush()
        log_visualization(run, {"sheet": np.zeros((4, 4, 3), dtype=np.uint8)}, step=9, text="")
        images = wait_for(f"{url}/images/images?tag=sheet&run=.&sample=0", 1)
        assert [image["step"] for image in images] == [9]
        scalars = wait_for(f"{url}/scalars/scalars?tag=loss%2Ftotal&run=.", STEPS + 1)
        assert [step for _, step, _ in scalars] == list(range(1, STEPS + 2))


def find_browser() -> str:
    for name in BROWSERS:
        path = shutil.which(name)
        # It may be a stub that tells how to install it.
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    pytest.skip(f"needs Chromium, and none of {', '.join(BROWSERS)} is here")


def wait_for(url: str, count: int, process: subprocess.Popen[bytes] | None = None) -> list[Any]:
    """The list at `url` once it has `count` entries, or after a minute."""
    deadline = time.monotonic() + 60
    found: list[Any] = []
    while len(found) < count and time.monotonic() < deadline:
        assert process is None or process.poll() is None, "TensorBoard has ended"
        # TensorBoard answers 404 until it has read the log, and refuses before it listens.
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as response:
            found = json.load(response)
        time.sleep(0.1)
    return found


def node(page: "Page", name: str) -> "Locator":
    """A node that the graph shows, by its full name."""
    found = page.locator(f'g.node[data-name="{name}"]').first
    found.wait_for()
    return found


def expand(page: "Page", name: str) -> None:
    node(page, name).locator(":scope > g.nodeshape").dispatch_event("dblclick")
    page.locator(f'g.node.expanded[data-name="{name}"]').wait_for()


def shown_from_the_bottom_up(page: "Page", *names: str) -> None:
    """Nodes that lie one above the other, once they have slid into their places."""
    deadline = time.monotonic() + PATIENCE / 1000
    order: list[str] = []
    while order != list(names) and time.monotonic() < deadline:
        boxes = {name: node(page, name).locator(":scope > g.nodeshape").bounding_box() for name in names}
        order = sorted(names, key=lambda name: -(boxes[name] or {"y": 0})["y"])
    assert order == list(names)


def card(page: "Page", kind: str, tag: str) -> "Locator":
    """The card of exactly this tag on a dashboard, whose groups of tags may be closed."""
    dashboard = page.locator(f"tf-{kind.split('-')[0]}-dashboard")
    dashboard.locator("tf-tag-filterer input").fill(f"^{tag}$")
    found = dashboard.locator(f"tf-{kind}").filter(has_text=re.compile(rf"tag: {tag}(?![\w/])"))
    found.first.wait_for()
    found.first.scroll_into_view_if_needed()
    return found.first


def drawn(paths: "Locator", *, corners: int) -> None:
    """One of the lines has at least so many corners, once the data has arrived."""
    deadline = time.monotonic() + PATIENCE / 1000
    longest = 0
    while longest < corners and time.monotonic() < deadline:
        lines = paths.evaluate_all("paths => paths.map(path => path.getAttribute('d') || '')")
        longest = max((len(re.findall("[ML]", line)) for line in lines), default=0)
    assert longest >= corners


def shown(loader: "Locator") -> tuple[int, int]:
    """Width and height of an image, once it has arrived."""
    image = loader.locator("img")
    image.wait_for()
    size = image.evaluate("async image => (await image.decode(), [image.naturalWidth, image.naturalHeight])")
    return tuple(size)
