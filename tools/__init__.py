"""How the demo was made, and the long tests: none of it is part of the pipeline."""

import pdf2lora.quiet  # noqa: F401, before bitsandbytes is imported
