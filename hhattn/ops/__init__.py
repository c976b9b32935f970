"""The public ops, one module each: documentation, validation, shapes for tracing, gradients."""
