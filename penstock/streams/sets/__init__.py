"""Packed sets: how they are made, described, checked and shown, and where they lie."""
