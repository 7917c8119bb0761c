"""The recipe that made the embedded default model; `python -m models.training --help`."""
