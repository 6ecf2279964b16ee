"""The mathematics in plain torch, float64."""
