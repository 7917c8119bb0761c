"""Models on disk and models in memory."""
