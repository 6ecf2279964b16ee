"""A small PPO loop for language models; start reading at `loop.py`."""
