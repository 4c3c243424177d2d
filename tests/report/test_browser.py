"""The page in a browser: nothing is cut off, on wide screens and narrow ones, light and dark.

It takes Debian's chromium, or another one on the path: ``apt-get install chromium``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_up_comparison import comparison_page
from made_up_log import write_run
from matplotlib.image import imread

from ep_comm.report.document import to_html
from ep_comm.report.findings import find_all
from ep_comm.report.page import render
from ep_comm.report.run import read

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="NO BROWSER: apt-get install chromium"),
]
LIGHT, DARK = 1, 0  # as chromium numbers the schemes
# What sticks out of its picture, and how wide the page is beside the window.
LOOK = """<script>addEventListener("load", () => {
  const out = [];
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const at = text.getBoundingClientRect();
      if (at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 ||
          at.bottom > box.bottom + 1) out.push(text.textContent);
    }
  }
  const pre = document.createElement("pre");
  pre.id = "looked";
  pre.textContent = JSON.stringify({
    out, width: document.documentElement.scrollWidth, window: innerWidth,
    family: getComputedStyle(document.querySelector("svg text")).fontFamily,
  });
  document.body.append(pre);
});</script>"""


def chromium(page: Path, *flags: str, width: int = 1240, height: int = 900) -> str:
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--window-size={width},{height}", f"--user-data-dir={page.parent / 'profile'}", *flags),
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[int | str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = [read(write_run(folder / name, 120, seed=len(name))) for name in ("first", "another")]
    texts: dict[int | str, str] = {
        number: render(runs[:number], find_all(runs[:number]), "ep-comm report")
        for number in (1, 2)
    }
    texts["compare"] = to_html(comparison_page(folder))
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("which", [1, 2, "compare"])
@pytest.mark.parametrize("width", [1240, 600])
def test_nothing_is_cut_off(pages, which, width, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(pages[which].read_text().replace("</body>", f"{LOOK}</body>"))
    dom = chromium(page, "--dump-dom", width=width)
    looked = json.loads(re.search(r'<pre id="looked">(.*?)</pre>', dom, re.S)[1])
    assert looked["out"] == []
    assert looked["width"] <= looked["window"]  # pictures and tables scroll, the page does not
    assert looked["family"].startswith("system-ui")


@pytest.mark.parametrize("which", [1, "compare"])
@pytest.mark.parametrize(("scheme", "is_dark"), [(LIGHT, False), (DARK, True)])
def test_it_is_light_or_dark_as_the_reader_likes(pages, which, scheme, is_dark, tmp_path):
    picture = tmp_path / "page.png"
    chromium(
        pages[which],
        f"--screenshot={picture}",
        f"--blink-settings=preferredColorScheme={scheme}",
        height=4000,
    )
    pixels = np.round(255 * imread(picture)[..., :3]).astype(int)
    paper = (15, 19, 24) if is_dark else (255, 255, 255)
    line = (88, 166, 255) if is_dark else (9, 105, 218)
    assert tuple(pixels[5, 5]) == paper
    assert (np.abs(pixels - line).sum(axis=2) == 0).sum() > 500  # the lines of the pictures
    ink = pixels.mean(axis=2)
    assert ((ink > 200) if is_dark else (ink < 60)).sum() > 5000  # words, on this paper


@pytest.mark.parametrize("which", [1, "compare"])
def test_it_can_be_printed(pages, which, tmp_path):
    printed = tmp_path / "page.pdf"
    chromium(pages[which], f"--print-to-pdf={printed}")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes())) <= 12
