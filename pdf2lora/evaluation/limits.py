"""Limits above which evaluate and report print a warning."""

COSTLY_QUANTIZATION = 0.05  # increase of the perplexity of the base, as a share
