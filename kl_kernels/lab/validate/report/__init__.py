"""Errors of every backend and of torch eager against float64: `validate --report DIR`."""
