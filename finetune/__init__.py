"""Stage 2: transfer learning, distillation and regularization of a pretrained backbone."""
