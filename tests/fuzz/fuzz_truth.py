"""True results of calls, from their arguments in float64."""

import math

import torch


def log_p(logits, temperature=1.0, softcap=None, support=None):
    z = logits.double()
    if softcap is not None:
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    return (z / temperature).masked_fill(_left_out(support, z), -torch.inf).log_softmax(-1)


def _left_out(support, logits):  # [..., V] tokens that are not in a row's set
    outside = torch.zeros(logits.shape, dtype=torch.bool)
    if support is not None:
        ends = support.offsets.tolist()
        for row, first, last in zip(outside.flatten(0, -2), ends, ends[1:]):
            if first < last:
                row[:] = True
                row[support.token_ids[first:last]] = False
    return outside


def _sum(weights, of):  # 0 log 0 is 0
    return torch.where(weights == 0, 0.0, weights * of).sum(-1)


def _other(a, name):
    value = a.get(f"ref_{name}")
    return a.get(name, 1.0) if value is None and name != "softcap" else value


def _two(a):
    support = a.get("support")
    p = log_p(a["logits"], a.get("temperature", 1.0), a.get("softcap"), support)
    of_ref = support if a.get("ref_support") != "full" else None
    return p, log_p(a["ref_logits"], _other(a, "temperature"), a.get("ref_softcap"), of_ref)


def _at(p, ids, mask):
    ids = ids.long() if mask is None else ids.long().masked_fill(~mask.bool(), 0)
    return p.gather(-1, ids[..., None])[..., 0]


def token_stats(a):
    p = log_p(a["logits"], a.get("temperature", 1.0), a.get("softcap"), a.get("support"))
    return _at(p, a["token_ids"], a.get("mask")), -_sum(p.exp(), p)


def token_kl(a):
    p, q = _two(a)
    ids = a["token_ids"], a.get("mask")
    entropy, forward_kl = -_sum(p.exp(), p), _sum(q.exp(), q - p)
    if a.get("ref_support") == "full":  # infinite by definition
        forward_kl[_left_out(a.get("support"), p).any(-1)] = torch.inf
    return _at(p, *ids), _at(q, *ids), _sum(p.exp(), p - q), forward_kl, entropy


def jsd(p, q, beta):
    if beta == 0:
        return _sum(q.exp(), q - p)
    if beta == 1:
        return _sum(p.exp(), p - q)
    m = torch.logaddexp(p + math.log(1 - beta), q + math.log(beta))
    return beta * _sum(q.exp(), q - m) + (1 - beta) * _sum(p.exp(), p - m)


def token_jsd(a):
    return (jsd(*_two(a), a.get("beta", 0.5)),)


def selective_log_softmax(a):
    p = log_p(a["logits"], a.get("temperature", 1.0), support=a.get("support"))
    index, mask = a["index"].long(), a.get("row_mask")
    if index.ndim < p.ndim:
        return (_at(p, index, mask),)
    if mask is not None:
        index = index.masked_fill(~mask.bool()[..., None], 0)
    return (p.gather(-1, index),)


def topk_kl(a):
    p = log_p(a["logits"], a.get("temperature", 1.0), a.get("softcap"))
    ids = a["topk_ids"].long()
    mask = a.get("mask")
    if mask is not None:
        ids = ids.masked_fill(~mask.bool()[..., None], 0)
    q = a["topk_logprobs"].double()
    rest = p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    tail = 1 - q.exp().sum(-1, keepdim=True)
    # A tail that rounding hides counts as that rounding: no truth says how large it was.
    tail = torch.where(tail < 1e-2, torch.nan, tail).log()
    if ids.shape[-1] == p.shape[-1]:  # nothing is left of a vocabulary of which all is listed
        tail = torch.full_like(tail, -torch.inf)
    events = torch.cat([p.gather(-1, ids), rest], -1)
    return (jsd(events, torch.cat([q, tail], -1), a.get("beta", 0.0)),)


def _heads(a):
    def logits(prefix):
        z = a[f"{prefix}hidden"].double() @ a[f"{prefix}weight"].double().T
        bias = a.get(f"{prefix}bias")
        scale = a.get("logit_scale", 1.0) if not prefix else _other(a, "logit_scale")
        return scale * (z if bias is None else z + bias.double())

    both = {"logits": logits("")}
    if "ref_hidden" in a:
        both["ref_logits"] = logits("ref_")
    return {**a, **both}


def linear_token_stats(a):
    return token_stats(_heads(a))


def linear_token_kl(a):
    return token_kl(_heads(a))


def linear_token_jsd(a):
    return token_jsd(_heads(a))


def compute_gae(a):
    rewards, values, mask = a["rewards"].double(), a["values"].double(), a["mask"].bool()
    gamma, lam, skip = a.get("gamma", 1.0), a.get("lam", 0.95), a.get("masked", "skip") == "skip"
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(len(rewards)):
        next_value = next_advantage = 0.0
        for t in reversed(range(rewards.shape[1])):
            counts = bool(mask[b, t])
            reward, value = (float(x[b, t]) if counts else 0.0 for x in (rewards, values))
            advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
            if counts:
                advantages[b, t], returns[b, t] = advantage, advantage + value
            if counts or not skip:
                next_value, next_advantage = value, advantage
    return advantages, returns


def masked_mean(a):
    x = a["x"][a["mask"].bool()].double()
    return (x.mean() if len(x) else x.new_zeros(()),)


def masked_var(a):
    x = a["x"][a["mask"].bool()].double()
    return (x.var() if len(x) > 1 else x.new_zeros(()),)


def compute_rewards(a):
    kl, mask = a["kl"].double(), a["mask"].bool()
    clip, coef = a.get("kl_clip"), a["kl_coef"]
    kl = kl if clip is None else kl.clamp(-clip, clip)
    rewards = torch.where(mask & (coef != 0), -coef * kl, 0.0)
    for b, row in enumerate(mask):
        if row.any():
            score = a["scores"][b].double()
            bound = a.get("score_clip")
            rewards[b, int(row.nonzero().max())] += (
                score if bound is None else score.clamp(-bound, bound)
            )
    return (rewards,)


# Masked rows are 0 in these, whatever they hold.
PER_TOKEN = {
    "token_stats": "mask",
    "token_kl": "mask",
    "token_jsd": "mask",
    "topk_kl": "mask",
    "selective_log_softmax": "row_mask",
    "linear_token_stats": "mask",
    "linear_token_kl": "mask",
    "linear_token_jsd": "mask",
}
TRUTHS = {
    f.__name__: f
    for f in (
        token_stats, token_kl, token_jsd, selective_log_softmax, topk_kl, linear_token_stats,
        linear_token_kl, linear_token_jsd, compute_gae, masked_mean, masked_var, compute_rewards,
    )
}  # fmt: skip
