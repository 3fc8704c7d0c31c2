"""screenshots: reports/index.html, dvc_plots/index.html -> docs/images/*.png

Parts of the pages as Chromium draws them, for the documentation. Chromium (or Chrome) must be on the PATH; nothing is
loaded from the internet. Needs pillow, which matplotlib brings along.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from pdf2lora.errors import InputError, report_input_errors

REPORT = Path("reports/index.html")
PLOTS = Path("dvc_plots/index.html")
IMAGES = Path("docs/images")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT, PADDING = 1200, 2400, 24  # pixels
PLOTS_WIDTH = 1260  # two plots side by side
COLOURS = 128  # of a PNG: a third of the bytes, and nobody sees it

# name of the image -> sections of the report that it shows, theme, width
PARTS = {
    "report": (("header", "#perplexity"), "light", WIDTH),
    "text": (("#text",), "light", WIDTH),
    "training": (("#training",), "dark", WIDTH),
    "batch": (("#batch",), "light", WIDTH),
    "phone": (("header", "#perplexity"), "dark", 500),
}


@report_input_errors
def main() -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise InputError(f"PATH: has none of {', '.join(BROWSERS)}; install one of them")
    for page, command in ((REPORT, "dvc repro"), (PLOTS, "make plots")):
        if not page.exists():
            raise InputError(f"{page}: is not there; run {command} first")

    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, (sections, theme, width) in PARTS.items():
        hidden = "".join(f":not({section})" for section in sections)
        style = (
            f"<style>header{hidden}, nav, section{hidden}, footer {{ display: none; }} section {{ margin: 0; }}</style>"
        )
        photograph(browser, REPORT, IMAGES / f"{name}.png", theme=theme, width=width, style=style)
    photograph(browser, PLOTS, IMAGES / "plots.png", theme="light", width=PLOTS_WIDTH, style="")
    print(f"screenshots: {len(PARTS) + 1} in {IMAGES}")


def photograph(
    browser: str, page: Path, image: Path, *, theme: str, width: int, style: str, height: int = HEIGHT
) -> None:
    """A picture of the page with a style added, cut where nothing follows."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / page.name
        copy.write_text(page.read_text(encoding="utf-8").replace("</head>", f"{style}</head>"), encoding="utf-8")
        if (page.parent / "machine.js").exists():
            shutil.copy(page.parent / "machine.js", folder)
        dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *quiet, *dark),
                f"--user-data-dir={folder}/profile",
                f"--window-size={width},{height}",
                f"--screenshot={folder}/whole.png",
                copy.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        cut(Image.open(f"{folder}/whole.png").convert("RGB")).quantize(COLOURS).save(image, optimize=True)


def cut(picture: Image.Image) -> Image.Image:
    """Without the empty rows below what is drawn; the colour of the last pixel is empty."""
    empty = Image.new("RGB", picture.size, picture.getpixel((picture.width - 1, picture.height - 1)))
    drawn = ImageChops.difference(picture, empty).getbbox()
    bottom = min(picture.height, drawn[3] + PADDING) if drawn else picture.height
    return picture.crop((0, 0, picture.width, bottom))


if __name__ == "__main__":
    main()
