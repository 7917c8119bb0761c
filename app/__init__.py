"""Fovea: the service. Never imports torch."""

__version__ = "0.1.0"
