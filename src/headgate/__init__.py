"""Headgate: one metered gateway for text completion. Importing it has no effects and costs next to nothing."""

__version__ = "0.1.0"
