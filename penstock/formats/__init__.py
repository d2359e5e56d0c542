"""Exports in the forms people deploy: `torch.export`, ONNX and ONNX in int8, each a single file that needs no Penstock.

Every form takes uint8 images [B, C, H, W], resized and cropped, with any B, and gives `logits` and calibrated
`probabilities` [B, K]; a backbone alone gives `features` [B, D]. Classes, preprocessing and temperature are inside it.
"""
