"""Rows that send some of their parts to the careful loop, and rows that only just do not."""

import torch

LOWEST = torch.finfo(torch.float32).min


def careful_rows(n_rows, vocab_size, starts, tile, most):
    """Logits of both models [n_rows, vocab_size], and tokens: troubles at random places.

    Peaks are about `most` times the weight of what surrounds them. The largest logit of each part
    that begins at `starts` is in its second tile and is not the token: the anchor of the fast loop
    is another number than that of the careful one.
    """
    g = torch.Generator().manual_seed(0)

    def pick(*choices):
        return choices[torch.randint(len(choices), (1,), generator=g)]

    def uniform(low, high):
        return low + (high - low) * torch.rand(1, generator=g).item()

    x, y = -torch.rand(2, n_rows, vocab_size, generator=g)
    token_ids = torch.randint(vocab_size, (n_rows,), generator=g)
    height = torch.tensor(float(most)).log().item()
    for row in range(n_rows):
        start = pick(*starts)
        end = min([s for s in starts if s > start], default=vocab_size)
        first, last = pick((start, start + tile), (end - tile, end), (end - 1, end), (start, end))
        n = pick(1, 1, tile // 8)
        where = torch.randint(first, last, (n,), generator=g)
        trouble = pick(0.0, -torch.inf, LOWEST, *(uniform(-0.5, 0.5) + height for _ in range(4)))
        for models in pick((x,), (y,), (x, y)):
            models[row, where] = trouble
        if pick(True, False):
            token_ids[row] = where[0]
    for start in starts:
        end = min([s for s in starts if s > start], default=vocab_size)
        place = start + tile + 3
        token_ids[token_ids == place] += 1
        x[:, place] = x[:, start:end].amax(1) + 0.01
    return x, y, token_ids
