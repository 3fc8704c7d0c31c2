"""Speed, memory and quality beside other libraries: none of it is part of the pipeline."""

import pdf2lora.quiet  # noqa: F401, before bitsandbytes is imported
