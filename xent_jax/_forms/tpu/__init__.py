"""The form of blocks of rows as TPU kernels: value and gradients of a linear head."""
