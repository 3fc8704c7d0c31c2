"""plots: vega's scripts out of vl-convert -> .dvc/tmp/plots.html, and DVC told to use it

DVC's own page of plots loads vega from the internet and stays blank without it. After this, `dvc plots show` and
`dvc plots diff` write pages that hold all they need (1 MB of scripts each), in this clone.
"""

import subprocess
import sys
from pathlib import Path

import vl_convert

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
#plots > div:has(svg.marks[width="0"]) {{ display: none; }} /* no data, such as one machine's in another commit */
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
    main()
