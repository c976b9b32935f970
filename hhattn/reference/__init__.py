"""The ops as formulas in plain PyTorch, one module each: the oracle all other implementations are tested against."""
