"""Metrics of runs that were never run, with outcomes that are known."""

import math

from kl_kernels.lab.ppo.config import PPOConfig

N_UPDATES = 60
CONSTANTS = PPOConfig(updates=N_UPDATES)


def run(*, gold_end, proxy_end=3.0, kl_end=20.0, length_end=28.0, gold_peak=None, kl_coef=0.1):
    """Make a run whose gold goes straight from 2 to its peak, at a third, and to its end."""
    peak = gold_end if gold_peak is None else gold_peak
    records = []
    for i in range(N_UPDATES):
        x, third = i / (N_UPDATES - 1), 1 / 3
        if x <= third:
            gold = 2 + (peak - 2) * x / third
        else:
            gold = peak + (gold_end - peak) * (x - third) / (1 - third)
        if x > 0.9:
            gold = gold_end
        records.append(
            {
                "update": i + 1,
                "proxy": proxy_end * min(1.0, x / 0.9),
                "proxy_sd": 1.0,
                "gold": gold,
                "kl": kl_end * min(1.0, x / 0.6),
                "kl_coef": kl_coef,
                "entropy": 4.0,
                "length": 28 + (length_end - 28) * min(1.0, x / 0.9),
                "seconds": 1.0,
            }
        )
    return records


def hacked(shift=0.0):
    """Gold follows Gao et al.'s form to 200 nats, where it is -2 + shift; its peak is near 4.9."""
    records = run(gold_end=0.0, proxy_end=10.0, kl_end=200.0)
    beta = 0.8
    alpha = (shift - 4) / math.sqrt(200) + beta * math.log(math.sqrt(200))
    for record in records[1:]:
        d = math.sqrt(record["kl"])
        record["gold"] = 2 + d * (alpha - beta * math.log(d))
    return records


def as_expected():
    """Runs of three seeds that bear every claim out."""
    shifts = (-0.2, 0.0, 0.2)
    return {
        "0": [hacked(s) for s in shifts],
        "0.03": [run(gold_peak=5.0, gold_end=3.0 + s, kl_end=60.0) for s in shifts],
        "0.1": [run(gold_end=4.8 + s, kl_end=18.0) for s in shifts],
        "5": [run(gold_end=2.1 + s, proxy_end=0.1, kl_end=0.3) for s in shifts],
        "adaptive": [run(gold_end=4.9 + s, kl_end=20 + s) for s in shifts],
    }


def estimates(ratio=(3.0, 2.5, 3.5)):
    """Make the results of `estimators.compare` for two policies."""

    def interval(mean, low, high):
        return {"mean": mean, "low": low, "high": high}

    return {
        beta: {
            "n": 100,
            "kl": interval(kl, 0.9 * kl, 1.1 * kl),
            "sd_exact": 1.0,
            "estimators": {
                name: {
                    "bias": interval(0.0, -0.1, 0.1),
                    "sd": 2.0,
                    "variance_ratio": interval(*ratio),
                }
                for name in ("k1", "k2", "k3")
            },
        }
        for beta, kl in (("5", 0.3), ("0", 200.0))
    }
