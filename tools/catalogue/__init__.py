"""Compares the built-in catalogue with genai-prices: `python -m tools.catalogue`."""
