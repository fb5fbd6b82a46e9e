"""The page of a run: whole, of itself alone, and legible; by a parser, and in a browser where there is one."""

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmnist import plots, report
from fmnist.errors import UserError

NASTY = """<script>alert(1)</script> & "quotes" 'too' {body} 衬衫"""
VOID = {"meta", "img", "br", "link", "hr", "input"}
BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chrome")
EPOCHS = [
    {"event": "epoch", "epoch": i, "train_loss": 1 / i, "train_accuracy": 0.5, "test_loss": 1.25 / i,
     "test_accuracy": 0.0625 * i, "seconds": 0.5, "images_per_second": 12345.6}
    for i in (1, 2, 3)
]  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as train leaves it, with a name and a source that must not be taken for HTML."""
    made = tmp_path_factory.mktemp("runs") / "run <b>{body}"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"model": "softmax", "epochs": 3, "lr": 0.1, "data": NASTY}))
    start = {"event": "start", "model": "softmax", "torch": "9.8.7", "data_source": NASTY, "warning": "SAMPLE"}
    records = [start, *EPOCHS, {"event": "end", "test_accuracy": 0.1875}]
    (made / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plots.curves(EPOCHS, "three epochs", made / "curves.png")
    plots.templates(np.random.default_rng(0).normal(size=(10, 784)), made / "templates.png")
    shutil.copy(made / "curves.png", made / "another.png")
    return made


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / drawn.name))


class Page(HTMLParser):
    """What the page holds, and an AssertionError where a tag is closed that is not open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], "tags that are not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text


def written(folder: Path) -> tuple[str, Page]:
    html = report.write(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_it_is_well_formed_and_asks_for_nothing_else(folder: Path) -> None:
    html, page = written(folder)
    assert html.startswith("<!DOCTYPE html>")
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form", "b"), tag
        assert not {"href", "srcset", "style", "action"} & set(attributes)
        if "src" in attributes:
            assert tag == "img" and (attributes["src"] or "").startswith("data:image/png;base64,")
    assert "url(" not in html and "@import" not in html and "//" not in re.sub(r'src="[^"]*"', "", html)
    (policy,) = (a["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")


def test_every_picture_of_the_folder_is_in_it_bit_for_bit_and_described(folder: Path) -> None:
    _, page = written(folder)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    contents = [base64.b64decode((image["src"] or "").split(",")[1]) for image in images]
    assert contents == [(folder / name).read_bytes() for name in ("curves.png", "templates.png", "another.png")]
    assert [image["alt"] for image in images] == [
        report.CAPTIONS["curves.png"],
        report.CAPTIONS["templates.png"],
        "another",
    ]


def test_config_versions_and_every_epoch_are_in_it(folder: Path) -> None:
    _, page = written(folder)
    lines = page.text.splitlines()
    for text in ("SAMPLE", "9.8.7", "softmax", "training loss", "0.1875"):
        assert text in page.text
    assert page.text.count(NASTY) == 2 and page.text.count("run <b>{body}") == 2
    for epoch in EPOCHS:
        assert f"{epoch['epoch']}{epoch['train_loss']:.4f}0.5000{epoch['test_loss']:.4f}" in "".join(lines)
    assert "not come to its end" not in page.text


def test_its_head_says_model_and_date_and_it_has_each_classs_accuracy_and_the_calibration(folder: Path) -> None:
    settings = {"model": "softmax", "loss": "mse", "lr": 0.1, "batch_size": 256, "seed": 3}
    (folder / "config.json").write_text(json.dumps(settings))
    start = {"event": "start", "date": "2026-01-02T03:04:05+00:00", "command": "python -m fmnist train"}
    end = {"event": "end", "test_accuracy": 0.1875, "calibration_error": 0.0625, "class_accuracy": {"Bag": 0.75}}
    text = "".join(json.dumps(record) + "\n" for record in [start, *EPOCHS, end])
    (folder / "metrics.jsonl").write_text(text)
    _, page = written(folder)
    assert "softmax, mse loss, lr 0.1, batch size 256, seed 3, 2026-01-02 03:04:05+00:00" in page.text
    assert "calibration error0.0625" in page.text and "Bag0.7500" in page.text.replace("\n", "")
    assert "python -m fmnist train" in page.text


def test_a_run_that_was_cut_off_has_a_page_that_says_so(folder: Path) -> None:
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole[: whole.index('{"event": "epoch", "epoch": 3') + 40])
    for picture in folder.glob("*.png"):
        picture.unlink()
    _, page = written(folder)
    assert "not come to its end" in page.text and "0.1250" in page.text and "0.1875" not in page.text


def test_a_loss_that_is_not_a_number_is_shown_as_it_is(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "epoch", "epoch": 4, "train_loss": float("nan"), "test_loss": None}) + "\n")
    _, page = written(folder)
    assert "4nannot given" in page.text.replace("\n", "")


def test_what_is_no_run_is_said(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run: No such file"):
        report.write(tmp_path / "nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        report.write(folder)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('no\n{"event": "end"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no records of a run: line 1 is not JSON"):
        report.write(folder)


def test_a_folder_that_cannot_be_written_is_said(folder: Path) -> None:
    (folder / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        report.write(folder)


MEASURE = """<script>addEventListener("load", () => {
  const body = getComputedStyle(document.body);
  document.body.dataset.measured = JSON.stringify({
    widths: [...document.images].map(image => image.naturalWidth),
    shown: [...document.images].map(image => image.getBoundingClientRect().width),
    color: body.color, background: body.backgroundColor,
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:")),
    overflow: document.documentElement.scrollWidth - innerWidth })
})</script>"""


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_in_a_browser_every_picture_is_drawn_and_the_text_is_legible(folder: Path, tmp_path: Path, mode: str) -> None:
    """On a copy whose policy lets one script in: the script that measures."""
    html, page = written(folder)
    copy = tmp_path / "measured.html"
    policy = "default-src 'none'"
    copy.write_text(
        html.replace(policy, policy + "; script-src 'unsafe-inline'").replace("</body>", MEASURE + "</body>")
    )
    dom = browse(tmp_path, copy, mode, "--dump-dom")
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found is not None, "the page's script did not run"
    measured: dict[str, Any] = json.loads(found[1].replace("&quot;", '"'))
    n_images = sum(tag == "img" for tag, _ in page.tags)
    assert len(measured["widths"]) == n_images == 3
    assert min(measured["widths"]) >= 400 and min(measured["shown"]) >= 300
    assert measured["fetched"] == [] and measured["overflow"] <= 0
    text, background = (luminance(measured[key]) for key in ("color", "background"))
    assert (text > background) == (mode == "dark")
    contrast = (max(text, background) + 0.05) / (min(text, background) + 0.05)
    assert contrast >= 7, "the AAA level of WCAG 2.2"


def test_in_a_browser_the_page_as_it_is_shows_its_pictures(folder: Path, tmp_path: Path) -> None:
    """The page itself, policy and all: the templates' red and blue are on the screen, which no text of it has."""
    from matplotlib import image

    browse(tmp_path, report.write(folder), "dark", f"--screenshot={tmp_path / 'screen.png'}", "--window-size=900,1800")
    pixels = image.imread(tmp_path / "screen.png")[..., :3]
    red = (pixels[..., 0] > 0.6) & (pixels[..., 1:].max(-1) < 0.45)
    blue = (pixels[..., 2] > 0.6) & (pixels[..., 0] < 0.4)
    assert red.sum() > 1000 and blue.sum() > 1000
    assert pixels[-1, 0].max() < 0.2, "not dark"


def browse(scratch: Path, page: Path, mode: str, *options: str) -> str:
    """What headless Chromium prints about the page."""
    paths = [
        path for name in BROWSERS if (path := shutil.which(name)) and not os.path.realpath(path).startswith("/snap")
    ]
    if not paths:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the PATH (a snap sees no /tmp)")
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
    command = [paths[0], "--headless", "--no-sandbox", "--disable-gpu", "--window-size=520,900", *quiet.split()]
    command += [f"--user-data-dir={scratch / 'profile'}", "--hide-scrollbars"]
    command += [f"--blink-settings=preferredColorScheme={int(mode == 'light')}", *options, page.resolve().as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def luminance(color: str) -> float:
    """Relative luminance of "rgb(r, g, b)", as WCAG 2.2 defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
