"""plots: the vega scripts of vl-convert -> .dvc/tmp/plots.html, DVC's template for pages of plots

DVC's own template loads vega from the internet, so its pages are empty without internet. After this command, `dvc plots
show` and `dvc plots diff` in this clone write pages that contain the scripts (1 MB each).
"""

import subprocess
import sys
from pathlib import Path

import vl_convert

from pdf2lora.runtime.arguments import require_no_arguments
from pdf2lora.runtime.files import atomic_write

TEMPLATE = Path(".dvc/tmp/plots.html")
PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pdf2lora: plots</title>
<style>
body {{ font: 0.9rem sans-serif; }}
#plots {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 36rem), 1fr)); gap: 1rem; }}
#plots > div {{ overflow-x: auto; }}
#plots > div:has(svg.marks[width="0"]) {{ display: none; }} /* a plot without data */
</style>
<script>{vega}</script>
</head>
<body>
<div id="plots">
{{plot_divs}}
</div>
</body>
</html>
"""


def main() -> None:
    page = PAGE.format(vega=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))

    with atomic_write(TEMPLATE) as partial:
        partial.write_text(page, encoding="utf-8")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "config", "--local", "plots.html_template", str(TEMPLATE.relative_to(".dvc"))], check=True)
    sys.exit(subprocess.run([*dvc, "plots", "show"]).returncode)


if __name__ == "__main__":
    require_no_arguments(__doc__)
    main()
