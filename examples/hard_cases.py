"""Six inputs that every run meets one day: what the usual formula makes of them, and the truth."""

import torch

from kl_kernels import compute_rewards, kl_penalty, token_kl, token_stats


def entropy_of_a_padded_vocabulary():
    """Padding, top-k and top-p put logits at -inf, and 0 * -inf is NaN."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf]])
    logprobs = logits.log_softmax(-1)
    usual = -(logprobs.exp() * logprobs).sum()
    true = torch.distributions.Categorical(logits=logits[:, :3].double()).entropy()
    return usual, token_stats(logits, torch.tensor([0])).entropy, true


def kl_of_a_token_far_from_the_reference():
    """k3 grows as 1 / p(token): at 100 nats it overflows. The exact KL weighs it with p."""
    logits, ref_logits = torch.tensor([[0.0, 100.0]]), torch.zeros(1, 2)
    token = torch.tensor([0])  # the unlikely one was sampled
    d = (ref_logits.log_softmax(-1) - logits.log_softmax(-1))[0, 0]
    usual = d.exp() - d - 1
    true = torch.tensor(2.0).double().log()
    return usual, token_kl(logits, ref_logits, token).kl, true


def kl_after_a_small_step():
    """exp(d) - d - 1 is the difference of equal numbers: 0, or rounding."""
    logprob, ref_logprob = torch.tensor([-1.0]), torch.tensor([-1.0002])
    d = ref_logprob - logprob
    true = torch.expm1(d.double()) - d.double()
    return d.exp() - d - 1, kl_penalty(logprob, ref_logprob, "k3"), true


def pull_of_a_token_that_drifted():
    """A clamped KL has no gradient, so the token that went furthest is left alone."""
    ref_logprob = torch.tensor([-1.0])
    pulls = []
    for clamped in (
        lambda logprob: ((ref_logprob - logprob).expm1() - (ref_logprob - logprob)).clamp(max=10),
        lambda logprob: kl_penalty(logprob, ref_logprob, "k3", kl_clamp=10.0),
    ):
        logprob = torch.tensor([-5.0], requires_grad=True)
        (pull,) = torch.autograd.grad(clamped(logprob).sum(), logprob)
        pulls.append(pull)
    return *pulls, 1 - torch.tensor(4.0).double().exp()  # k3's: 1 - p_ref / p


def reward_of_an_empty_response():
    """A mask without tokens, whose last token is often taken to be the last column."""
    mask, score = torch.zeros(1, 4, dtype=torch.bool), torch.tensor([7.0])
    last = 3 - mask.long().flip(1).argmax(1)
    usual = torch.zeros(1, 4).scatter(1, last[:, None], score[:, None])
    return usual.sum(), compute_rewards(score, torch.zeros(1, 4), mask, 0.1).sum(), 0.0


def mean_kl_beside_a_nan():
    """A padded position may hold anything, and NaN * 0 is NaN."""
    kl, mask = torch.tensor([[0.5, torch.nan]]), torch.tensor([[True, False]])
    usual = -0.1 * (kl * mask).sum()
    return usual, compute_rewards(torch.zeros(1), kl, mask, 0.1).sum(), -0.05


CASES = [
    entropy_of_a_padded_vocabulary,
    kl_of_a_token_far_from_the_reference,
    kl_after_a_small_step,
    pull_of_a_token_that_drifted,
    reward_of_an_empty_response,
    mean_kl_beside_a_nan,
]

if __name__ == "__main__":
    print(f"{'':38}{'usual':>12}{'here':>12}{'true':>12}")
    for case in CASES:
        values = "".join(f"{float(value):12.5g}" for value in case())
        print(f"{case.__name__.replace('_', ' '):38}{values}")
