"""Attention processors for diffusers' transformers, one module a family. Imported only when such a model is there."""
