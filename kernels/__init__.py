"""Triton kernels, one module an op, under the op's own stem. Installed as ``hhattn.kernels``."""
