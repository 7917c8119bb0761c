"""The receipt: what a version does on a machine, in a page for people and in figures for programs."""
