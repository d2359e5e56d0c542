"""Penstock: streams of images in, small accurate models out."""

__version__ = "0.1.0"
