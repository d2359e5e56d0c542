"""Stage 1: pretraining backbones without labels."""
