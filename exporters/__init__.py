"""From PyTorch to a published version. Needs the `export` extra; the service never imports this package."""
