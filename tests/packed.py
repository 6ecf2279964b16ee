"""Packed batches, and the padded form of what is in them."""

import torch
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

# Lengths of sequences: some empty, at the ends too.
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5)


class Pack:
    """Sequences of these lengths, [N] or [1, N] end to end, or [S, T] padded."""

    def __init__(self, lengths, seed=0, *, as_row=False, dtype=torch.int64):
        self.lengths, self.as_row = list(lengths), as_row
        self.n, self.longest = sum(self.lengths), max(self.lengths, default=0)
        self.cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(dtype)
        self.g = torch.Generator().manual_seed(seed)

    def normal(self, *width):
        return self._shaped(torch.randn(self.n, *width, generator=self.g, dtype=torch.float64))

    def mask(self, share=0.7):
        return self._shaped(torch.rand(self.n, generator=self.g) < share)

    def ids(self, vocab_size):
        return self._shaped(torch.randint(vocab_size, (self.n,), generator=self.g))

    def scores(self):
        return torch.randn(len(self.lengths), generator=self.g, dtype=torch.float64)

    def split(self, packed):
        """Each sequence by itself, [L, ...]."""
        return (packed[0] if self.as_row else packed).split(self.lengths)

    def padded(self, packed):  # [S, T, ...]
        return pad_sequence(list(self.split(packed)), batch_first=True)

    def packed(self, padded):
        real = self.padded(self._shaped(torch.ones(self.n, dtype=torch.bool)))
        return self._shaped(padded[real])

    def _shaped(self, tokens):
        return tokens[None] if self.as_row else tokens


PACKS = st.builds(
    Pack,
    LENGTHS,
    st.integers(0, 2**31),
    as_row=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
