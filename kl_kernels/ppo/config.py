"""Every constant of the PPO run: its default, where that comes from, and what it accepts.

The command line is derived from these fields (`add_arguments`), a run folder keeps them as
config.json (`to_json`), and nothing else in this package holds a constant of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from kl_kernels.checks import check_choice
from kl_kernels.monitor.constraint import ACTIONS, UpdateConstraint
from kl_kernels.monitor.names import NAMES

LITERATURE = """
[GAE] Schulman et al. (2016), High-dimensional continuous control using generalized advantage
estimation. [PPO] Schulman et al. (2017), Proximal policy optimization algorithms. [Ziegler] Ziegler
et al. (2019), Fine-tuning language models from human preferences. [37 details] Huang et al. (2022),
The 37 implementation details of proximal policy optimization. [GRPO] Shao et al. (2024),
DeepSeekMath. [DAPO] Yu et al. (2025), DAPO: an open-source LLM reinforcement learning system.
"""


def option(
    default: Any,
    reason: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
) -> Any:
    """A field of the configuration; `reason` is also its help on the command line."""
    return field(
        default=default,
        metadata={
            "reason": reason,
            "metavar": metavar or "|".join(choices or [type(default).__name__.upper()]),
            "limits": {
                "above": above,
                "at_least": at_least,
                "at_most": at_most,
                "below": below,
                "choices": choices,
            },
        },
    )


@dataclass(frozen=True)
class PPOConfig:
    """The constants of one run. The defaults are the embedded task's, minutes on two cores.

    Raises:
        ValueError: a value is outside what its field accepts.
        TypeError: a value is not of its field's type.
    """

    # What is trained, on what, towards what. Empty: the embedded task.
    model: str = option(
        "",
        "folder of a Hugging Face causal LM with its tokenizer; nothing is downloaded; default: "
        "pretrain a tiny one",
        metavar="DIR",
    )
    prompts: str = option(
        "",
        "text file with one prompt per line, or a .jsonl file with one chat per line, "
        '{"messages": [...]}; default: starts of the corpus\'s paragraphs',
        metavar="FILE",
    )
    reward: str = option(
        "",
        "a function (prompts, answers) -> scores, all lists; default: fit a reward model",
        metavar="MODULE:FUNCTION",
    )
    seed: int = option(0, "seed of every random choice", at_least=0)

    # The tiny language model: as much as two cores can pretrain in a minute.
    vocab_size: int = option(
        2048, "BPE tokens; more would not repeat often enough to be learned", at_least=300
    )
    hidden_size: int = option(128, "width of the tiny Llama, four heads", at_least=8)
    layers: int = option(4, "layers of the tiny Llama: 1.07M parameters in all", at_least=1)
    pretrain_steps: int = option(300, "enough for samples that look like the corpus", at_least=1)
    pretrain_batch: int = option(32, "windows of text per pretraining step", at_least=1)
    pretrain_lr: float = option(3e-3, "peak of the cosine; high, as the model is small", above=0)
    context: int = option(64, "tokens per window; prompt and answer fit in", at_least=2)

    # The reward model: few and noisy preferences, so that it has a blind spot to be exploited.
    reward_pairs: int = option(2048, "pairs of reference answers it is fitted to", at_least=10)
    label_sharpness: float = option(
        2.0, "the better answer wins with probability sigmoid(this x gold difference)", above=0
    )
    reward_epochs: int = option(10, "passes over the pairs", at_least=1)
    reward_lr: float = option(2e-2, "AdamW's rate for the reward model", above=0)
    reward_weight_decay: float = option(0.05, "AdamW's weight decay for it", at_least=0)

    # Rollouts.
    updates: int = option(60, "PPO updates; the KL has settled after about 40", at_least=1)
    batch_size: int = option(64, "answers sampled per update", at_least=2)
    prompt_tokens: int = option(8, "tokens of a paragraph that make a prompt", at_least=1)
    answer_tokens: int = option(40, "longest answer", at_least=1)

    # The KL to the reference model.
    reference: str = option(
        "copy",
        "what the policy is held to: a frozen copy, or itself without its LoRA adapter, which then "
        "is all that is trained",
        choices=("copy", "adapter"),
    )
    lora_rank: int = option(16, "rank of the adapter", at_least=1)
    kl_coef: float = option(
        0.1,
        "beta, score per nat; the start of an adaptive one: fixed, it holds 18 nats",
        at_least=0,
    )
    kl_in: str = option(
        "reward",
        "where the penalty is: the reward, which credits every token with the KL that follows it "
        "[Ziegler], or the loss alone, which sees a token's own [GRPO]",
        choices=("reward", "loss"),
    )
    kl_estimator: str = option(
        "exact",
        "per-token KL: over the vocabulary; sampled, k1 for the reward or k2 for the loss, which "
        "need the reference's log-probabilities once per rollout",
        choices=("exact", "k1", "k2"),
    )
    exact_kl_gradient: str = option(
        "loss",
        "how the sampled token feels the exact KL, which as a reward does not depend on it: "
        "differentiated in the loss (stable at any beta) or as a correction of its advantage",
        choices=("loss", "advantage"),
    )
    kl_clip: float = option(
        0.0,
        "bound of a token's KL in the reward, nats; 0: none, it would blunt the pull-back",
        at_least=0,
    )
    controller: str = option(
        "pi",
        "beta stays, or follows the KL: adaptive [Ziegler, 2.2], threshold [PPO, 4], or pi, which "
        "settles soonest",
        choices=("adaptive", "fixed", "threshold", "pi"),
    )
    kl_target: float = option(
        20.0,
        "where beta steers to: nats per answer, where the proxy still tells good from bad",
        above=0,
    )
    kl_horizon: int = option(
        192,
        "adaptive: answers to adapt over; the KL follows beta by ten updates, so that faster "
        "overshoots, and 10000 [Ziegler] outlasts the run",
        at_least=1,
    )
    kl_gain: float = option(0.2, "pi: share of the error that log beta moves per update", above=0)
    kl_lag: float = option(8.0, "pi: updates by which the KL is taken to follow beta", at_least=0)

    # What an answer is paid.
    score_clip: float = option(0.0, "bound of the score; 0: none", at_least=0)
    length_exponent: float = option(
        0.0, "scores are divided by tokens to this power; 1: a score per token", at_least=0
    )
    missing_eos_penalty: float = option(
        0.0, "price of an answer that was cut off, in units of the score", at_least=0
    )
    missing_eos: str = option(
        "subtract",
        "the price is subtracted from the score, or takes its place [37 details]",
        choices=("subtract", "replace"),
    )
    overlong_buffer: int = option(
        0, "last tokens over which a price for length grows [DAPO]; 0: none", at_least=0
    )
    overlong_factor: float = option(1.0, "that price in full, in units of the score", at_least=0)
    whiten_rewards: bool = option(
        False, "rewards in standard deviations, their mean kept [Ziegler]; the score does already"
    )

    # Advantages and losses.
    gamma: float = option(1.0, "no discount: answers end [Ziegler]", above=0, at_most=1)
    lam: float = option(0.95, "GAE's lambda [GAE; Ziegler]", at_least=0, at_most=1)
    clip: float = option(0.2, "policy ratios beyond 1 +- this earn nothing [PPO, table 3]", above=0)
    value_clip: float = option(0.2, "as far as a value may move per update [37 details]", above=0)
    value_coef: float = option(0.1, "weight of the value loss in the sum [Ziegler]", at_least=0)

    # Optimisation.
    epochs: int = option(2, "passes over each batch; more only clips more", at_least=1)
    minibatches: int = option(4, "optimizer steps per pass [37 details]", at_least=1)
    learning_rate: float = option(
        3e-4, "Adam's rate for the policy [37 details]; 1e-3 runs past the gold peak", above=0
    )
    value_lr: float = option(
        2e-3, "its rate for the value head, which starts from nothing", above=0
    )
    adam_beta1: float = option(0.9, "Adam's usual", at_least=0, below=1)
    adam_beta2: float = option(
        0.95, "short memory: the objective moves with the policy", at_least=0, below=1
    )
    adam_eps: float = option(1e-5, "Adam's epsilon [37 details]", above=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)

    # Limits, and who watches them.
    target_kl: float = option(
        0.0,
        "leave a batch early once KL(old policy || policy) is beyond, nats per token; 0: never",
        at_least=0,
    )
    early_stop: str = option(
        "before_step",
        "measured before each step, with a tolerance of 1.5 (Stable-Baselines3), or after each "
        "pass (CleanRL)",
        choices=("before_step", "after_epoch"),
    )
    max_update_kl: float = option(
        0.0, "limit of an update's KL(old policy || policy), nats per token; 0: none", at_least=0
    )
    max_ratio: float = option(
        0.0, "limit of any token's policy ratio in an update, above 1; 0: none", at_least=0
    )
    constraint: str = option("skip", "what happens to an update beyond a limit", choices=ACTIONS)
    kl_budget: float = option(
        0.0, "nats per answer beyond which the monitor speaks up; 0: none", at_least=0
    )
    log_to: str = option(
        "none",
        "a dashboard beside metrics.jsonl and audit.jsonl; its library has to be installed",
        choices=("none", "tensorboard", "wandb", "mlflow"),
    )
    metric_names: str = option("kl_kernels", "whose names metrics get on it", choices=tuple(NAMES))

    checkpoint_every: int = option(1, "updates between checkpoints", at_least=1)

    def __post_init__(self) -> None:
        fields = dataclasses.fields(self)
        for f in fields:
            _check_type(f.name, getattr(self, f.name), type(f.default))
        self._check_estimator()
        for f in fields:
            _check(f.name, getattr(self, f.name), **f.metadata["limits"])
        if self.hidden_size % 8:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it has to be a multiple of 8: four heads, "
                "each of even width"
            )
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size is {self.batch_size}; it has to be a multiple of minibatches, "
                f"{self.minibatches}"
            )
        if self.prompt_tokens + self.answer_tokens > self.context and not self.model:
            raise ValueError(
                f"context is {self.context}; it has to hold prompt_tokens + answer_tokens, "
                f"{self.prompt_tokens} + {self.answer_tokens}"
            )
        if self.controller != "fixed" and self.kl_coef == 0:
            raise ValueError("kl_coef is 0, which cannot adapt; use controller fixed with it")
        if self.controller == "adaptive" and self.kl_horizon < self.batch_size:
            raise ValueError(
                f"kl_horizon is {self.kl_horizon}; it has to be at least batch_size, "
                f"{self.batch_size}, or beta swings from update to update"
            )
        if self.overlong_buffer > self.answer_tokens:
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer}; it has to be at most answer_tokens, "
                f"{self.answer_tokens}"
            )
        self.update_constraint()

    def _check_estimator(self) -> None:
        """Refuse estimators whose expected policy gradient is another one, and say so.

        A value near the KL is no reason to train on one: see `kl_kernels.kl_penalty`.
        """
        wrong = {"reward": ("k2", "k3", "abs"), "loss": ("k1", "k3", "abs")}
        if self.kl_estimator in wrong.get(self.kl_in, ()):
            raise ValueError(
                f"kl_estimator is {self.kl_estimator!r}, whose expected policy gradient in the "
                f"{self.kl_in} is not that of the KL, so that it would train towards something "
                "else; accepted: 'exact', 'k1' in the reward, 'k2' in the loss"
            )

    def update_constraint(self) -> UpdateConstraint | None:
        if not (self.max_update_kl or self.max_ratio):
            return None
        return UpdateConstraint(self.max_update_kl or None, self.max_ratio or None, self.constraint)

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss holds a differentiable KL."""
        shared = self.kl_estimator == "exact" and self.exact_kl_gradient == "loss"
        return self.kl_in == "loss" or shared

    @property
    def corrects_advantages(self) -> bool:
        """Whether the KL's gradient at the sampled token comes through its advantage."""
        return self.kl_in == "reward" and not self.kl_in_loss

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PPOConfig:
        return cls(**json.loads(text))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field; only those that are given appear in the parsed namespace.

    Ranges and choices are left to `PPOConfig`, so that each is checked, and put in words, once.
    """
    parser.epilog = LITERATURE
    for f in dataclasses.fields(PPOConfig):
        default = "" if f.default == "" else f" (default: {f.default})"
        form: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(f.default, bool)
            else {"type": type(f.default), "metavar": f.metadata["metavar"]}
        )
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f.metadata["reason"] + default,
            **form,
        )


def _check_type(name: str, value: Any, kind: type) -> None:
    """A config.json may hold anything. (A bool is no number; an int is a float.)"""
    accepted = (int, float) if kind is float else (kind,)
    if type(value) not in accepted:
        raise TypeError(f"{name} is {value!r}; it has to be of type {kind.__name__}")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name} is {value!r}; it has to be text without NUL")


def _check(
    name: str,
    value: Any,
    above: float | None,
    at_least: float | None,
    at_most: float | None,
    below: float | None,
    choices: tuple[str, ...] | None,
) -> None:
    if choices is not None:
        check_choice(name, value, choices)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it has to be a finite number")
    if above is not None and not value > above:
        raise ValueError(f"{name} is {value}; it has to be above {above}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} is {value}; it has to be at least {at_least}")
    if at_most is not None and not value <= at_most:
        raise ValueError(f"{name} is {value}; it has to be at most {at_most}")
    if below is not None and not value < below:
        raise ValueError(f"{name} is {value}; it has to be below {below}")
