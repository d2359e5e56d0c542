"""Streams of images from WebDataset shards: the only folder that imports webdataset."""
