"""Optical character recognition (OCR) of single pages by RapidOCR, an optional package (requirements-ocr.txt).

RapidOCR (Apache-2.0) has its PP-OCR models in the wheel; it downloads nothing. It reads Chinese, Japanese, English and
other languages in Latin letters.
"""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pdf2lora.documents.columns import Box, column_order, same_row
from pdf2lora.documents.engines import OpenFile, Page

PACKAGES = ("rapidocr", "onnxruntime")
DPI = 200
MAX_SIDE_PIXELS = 4000  # of a rendered page; A3 at 200 dpi has 3,307


def installed_version() -> str | None:
    """Returns the versions of the OCR packages, or None if one is missing."""
    try:
        return ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    except PackageNotFoundError:
        return None


def open_ocr(file: Path) -> OpenFile:
    import pypdfium2

    document = pypdfium2.PdfDocument(file)

    def read_page(number: int) -> Page:
        page = document[number]
        try:
            scale = min(DPI / 72, MAX_SIDE_PIXELS / max(page.get_size()))
            image = page.render(scale=scale, grayscale=True).to_numpy()
        finally:
            page.close()
        return Page(_recognize(image))

    return OpenFile(len(document), read_page)


def _recognize(image: Any) -> str:
    """image: uint8 gray levels, shape (height, width) or (height, width, 1)."""
    import numpy as np

    image = image.reshape(image.shape[0], image.shape[1])
    if image.min() == image.max():  # a blank page
        return ""
    result = _engine()(np.repeat(image[:, :, None], 3, axis=2))
    if result.boxes is None:
        return ""
    corners = [(corner.min(axis=0), corner.max(axis=0)) for corner in result.boxes]
    boxes = [Box(float(low[0]), -float(high[1]), float(high[0]), -float(low[1])) for low, high in corners]
    return "\n".join(" ".join(result.txts[piece] for piece in line) for line in _reading_order(boxes))


def _reading_order(boxes: Sequence[Box]) -> list[list[int]]:
    """Returns the lines from top to bottom, or column by column, each with its pieces from left to right."""
    from_top = sorted(range(len(boxes)), key=lambda number: -boxes[number].top)
    rows: list[list[int]] = []
    for number in from_top:
        if rows and same_row(boxes[rows[-1][0]], boxes[number]):
            rows[-1].append(number)
        else:
            rows.append([number])
    rows = [sorted(row, key=lambda number: boxes[number].left) for row in rows]
    flat = [number for row in rows for number in row]
    lines = column_order([boxes[number] for number in flat])
    return rows if lines is None else [[flat[piece] for piece in line] for line in lines]


@cache
def _engine() -> Any:
    """Loads the models once per process, for one thread: documents are read in parallel."""
    from rapidocr import RapidOCR  # type: ignore[import-not-found]

    return RapidOCR(
        params={
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Global.log_level": "critical",
            "Global.use_cls": False,  # pages are upright, and the classifier rotates some lines by mistake
            "Global.max_side_len": MAX_SIDE_PIXELS,
            "Det.limit_type": "max",  # finds lines on a smaller image: half the time, the same errors
            "Det.limit_side_len": 1216,
        }
    )
