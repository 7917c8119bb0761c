"""Bytes -> pixels: pure functions, called on the decode threads; neither asyncio nor HTTP."""
