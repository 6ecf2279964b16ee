"""How far every backend, and torch eager, are from float64: `validate --report DIR`."""
