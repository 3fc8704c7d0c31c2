"""Checks and forecasts before a run: the machine, the corpus, the source model, memory, time and disk space."""
