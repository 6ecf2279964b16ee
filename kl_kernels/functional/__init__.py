"""The public functions, and what checks and shapes their arguments."""
