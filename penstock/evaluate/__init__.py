"""Evaluations of frozen features: each file holds one, which takes two `FeatureSet`s and gives metrics by name."""

from penstock.registry import Registry

EVALUATIONS = Registry("penstock.evaluate")
