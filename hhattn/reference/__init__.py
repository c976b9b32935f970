"""The ops as formulas in plain PyTorch, one module each: the oracle that every other implementation is tested against."""
