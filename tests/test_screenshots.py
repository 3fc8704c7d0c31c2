"""screenshots: the picture is cut where the page ends, what is missing is named, Chromium draws what is asked for."""

import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from PIL import Image

from commands import screenshots

BROWSER = next(filter(None, map(shutil.which, screenshots.BROWSERS)), None)


def test_empty_rows_are_cut_off():
    picture = Image.new("RGB", (50, 200), "white")
    picture.paste("red", (10, 5, 20, 60))

    assert screenshots.cut(picture).size == (50, 60 + screenshots.PADDING)
    assert screenshots.cut(Image.new("RGB", (50, 200), "white")).size == (50, 200)


def test_needs_a_browser(monkeypatch):
    monkeypatch.setenv("PATH", "")

    with pytest.raises(SystemExit) as stopped:
        screenshots.main()

    assert str(stopped.value).startswith("error: PATH: has none of chromium, chromium-browser, google-chrome")


def test_needs_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(screenshots.shutil, "which", lambda name: "/bin/true")

    with pytest.raises(SystemExit) as stopped:
        screenshots.main()

    assert str(stopped.value) == "error: reports/index.html: is not there; run dvc repro first"


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize(("theme", "colour"), [("light", (0, 128, 0)), ("dark", (0, 0, 255))])
def test_a_page_is_drawn_in_its_theme(tmp_path, theme, colour):
    page = tmp_path / "page.html"
    page.write_text(
        "<html><head><style>div { height: 40px; background: green; } body { margin: 0; }"
        "@media (prefers-color-scheme: dark) { div { background: blue; } }</style></head><div></div><p>gone</p></html>"
    )

    screenshots.photograph(
        str(BROWSER),
        page,
        tmp_path / "a.png",
        theme=theme,
        width=500,
        height=300,
        style="<style>p { display: none }</style>",
    )

    picture = Image.open(tmp_path / "a.png").convert("RGB")
    assert picture.getpixel((5, 5)) == colour
    assert picture.size == (500, 40 + screenshots.PADDING)


def test_the_documentation_s_images_exist_and_are_small():
    images = {path.name: path.stat().st_size for path in (REPOSITORY / "docs/images").glob("*.png")}
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    named = {
        word.split("images/")[1].split(")")[0]
        for page in pages
        for word in page.read_text().split()
        if "images/" in word
    }
    links = {
        (page.parent / target.split(")")[0].split("#")[0]).resolve()
        for page in pages
        for target in page.read_text(encoding="utf-8").split("](")[1:]
        if not target.startswith("http")
    }

    assert named <= set(images)
    assert set(images) == {f"{name}.png" for name in screenshots.PARTS} | {"plots.png"}
    assert max(images.values()) < 300_000
    assert not [link for link in links if not Path(link).exists()]
