"""Applications and tools on top of the library, which imports none of them."""
