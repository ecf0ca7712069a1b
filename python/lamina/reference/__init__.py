"""What the answers are: every op in plain PyTorch, dtype-generic, called in float64 by the tests."""
