"""Every constant of the PPO run: its default, where that comes from, and what it accepts.

The command line is derived from these fields (`arguments.py`), a run folder keeps them as
config.json (`to_json`), and nothing else in this package holds a constant of its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from kl_kernels.checks import check_choice, check_integer, check_number
from kl_kernels.monitor.constraint import ACTIONS, Action, UpdateConstraint
from kl_kernels.monitor.names import NAMES
from kl_kernels.rl.early_stop import KLEarlyStop, When
from kl_kernels.rl.scores import MissingEOS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Subset = TypeVar("Subset", bound="DataclassInstance")


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
    """Define a field of the configuration; `reason` is also its help on the command line."""
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

    # Model, prompts and reward. Empty: the embedded task.
    model: str = option(
        "",
        "folder of a Hugging Face causal language model with its tokenizer; nothing is "
        "downloaded; without it, a tiny Llama is pretrained first",
        metavar="DIR",
    )
    prompts: str = option(
        "",
        "text file with one prompt per line, or a .jsonl file with one chat per line, "
        '{"messages": [...]}; without it, prompts are the starts of paragraphs of the built-in '
        "corpus",
        metavar="FILE",
    )
    reward: str = option(
        "",
        "a function that takes (prompts, answers), two lists of texts, and returns a list of "
        "scores; without it, a small reward model is fitted first",
        metavar="MODULE:FUNCTION",
    )
    seed: int = option(0, "seed of every random choice", at_least=0)

    # The tiny language model, so small that two cores can pretrain it in a minute.
    vocab_size: int = option(
        2048,
        "tokens of the byte-pair vocabulary that is fitted to the corpus; of a larger one, many "
        "would be too rare to be learned",
        at_least=300,
    )
    hidden_size: int = option(
        128, "width of the tiny Llama, a multiple of 8; it has four heads", at_least=8
    )
    layers: int = option(4, "layers of the tiny Llama; with 4 it has 1.07M parameters", at_least=1)
    pretrain_steps: int = option(
        300, "pretraining steps; after 300, samples look like the corpus", at_least=1
    )
    pretrain_batch: int = option(32, "windows of text per pretraining step", at_least=1)
    pretrain_lr: float = option(
        3e-3,
        "highest learning rate of pretraining, which then follows a cosine down; small models "
        "can take a high one",
        above=0,
    )
    context: int = option(
        64, "tokens of a window of text; a prompt and its answer must fit in", at_least=2
    )

    # The reward model: few and noisy preferences, so that it has a blind spot to be exploited.
    reward_pairs: int = option(2048, "pairs of answers the reward model is fitted to", at_least=10)
    label_sharpness: float = option(
        2.0,
        "how reliable the labels of those pairs are: the better answer wins with probability "
        "sigmoid(this x difference of gold scores)",
        above=0,
    )
    reward_epochs: int = option(10, "passes over the pairs", at_least=1)
    reward_lr: float = option(2e-2, "AdamW's learning rate for the reward model", above=0)
    reward_weight_decay: float = option(
        0.05, "AdamW's weight decay for the reward model", at_least=0
    )

    # Rollouts.
    updates: int = option(
        60, "PPO updates; by default, the KL has settled after about 40", at_least=1
    )
    batch_size: int = option(
        64, "answers sampled per update, a multiple of minibatches", at_least=2
    )
    prompt_tokens: int = option(
        8, "tokens at the start of a paragraph that make a prompt", at_least=1
    )
    answer_tokens: int = option(40, "most tokens of an answer", at_least=1)

    # The KL to the reference model.
    reference: str = option(
        "copy",
        "the reference model: copy, a frozen copy of the model; or adapter, the model itself "
        "without its LoRA adapter, which is then all that is trained",
        choices=("copy", "adapter"),
    )
    lora_rank: int = option(16, "rank of the LoRA adapter", at_least=1)
    kl_coef: float = option(
        0.1,
        "weight of the KL penalty (beta), in units of the score per nat; where it adapts, the "
        "value it starts from; a fixed 0.1 keeps the KL near 18 nats per answer",
        at_least=0,
    )
    kl_in: str = option(
        "reward",
        "where the penalty is: in the reward, where a token is charged for the KL of all that "
        "follow it [Ziegler], or in the loss, where it is charged for its own alone [GRPO]",
        choices=("reward", "loss"),
    )
    kl_estimator: str = option(
        "exact",
        "KL per token: exact, over the whole vocabulary; or from the sampled token: k1 (in the "
        "reward) or k2 (in the loss)",
        choices=("exact", "k1", "k2"),
    )
    exact_kl_gradient: str = option(
        "loss",
        "an exact KL in the reward does not depend on the sampled token, so its gradient needs "
        "one more term: in the loss (stable at any beta), or as a correction of the advantage",
        choices=("loss", "advantage"),
    )
    kl_clip: float = option(
        0.0,
        "limit of a token's KL in the reward, in nats; 0: none; tokens beyond it are held back "
        "less than they should be",
        at_least=0,
    )
    controller: str = option(
        "pi",
        "how beta changes: adaptive [Ziegler, 2.2], threshold [PPO, 4], pi (settles soonest), "
        "or fixed (not at all)",
        choices=("adaptive", "fixed", "threshold", "pi"),
    )
    kl_target: float = option(
        20.0,
        "KL that beta is steered towards, in nats per answer; at 20, the reward model still "
        "tells good answers from bad",
        above=0,
    )
    kl_horizon: int = option(
        192,
        "for adaptive: answers over which beta adapts, at least batch_size; with fewer, beta "
        "overshoots, and the 10000 of [Ziegler] are more than a run has",
        at_least=1,
    )
    kl_gain: float = option(
        0.2, "for pi: share of the error that log beta moves by in an update", above=0
    )
    kl_lag: float = option(
        8.0, "for pi: updates by which the KL is expected to lag behind beta", at_least=0
    )

    # From scores to rewards.
    score_clip: float = option(0.0, "limit of a score's absolute value; 0: none", at_least=0)
    length_exponent: float = option(
        0.0,
        "scores are divided by the number of tokens to this power; 0: not at all, 1: a score "
        "per token",
        at_least=0,
    )
    missing_eos_penalty: float = option(
        0.0,
        "penalty for an answer that was cut off before its end token, in units of the score",
        at_least=0,
    )
    missing_eos: MissingEOS = option(
        "subtract",
        "whether that penalty is subtracted from the score or replaces it [37 details]",
        choices=get_args(MissingEOS),
    )
    overlong_buffer: int = option(
        0, "number of last tokens over which a penalty for length grows [DAPO]; 0: none", at_least=0
    )
    overlong_factor: float = option(
        1.0, "that penalty at full length, in units of the score", at_least=0
    )
    whiten_rewards: bool = option(
        False, "divide the rewards by their standard deviation, keeping their mean [Ziegler]"
    )

    # Advantages and losses.
    gamma: float = option(
        1.0, "discount per token; 1: none, as answers end [Ziegler]", above=0, at_most=1
    )
    lam: float = option(
        0.95, "lambda of generalized advantage estimation [GAE; Ziegler]", at_least=0, at_most=1
    )
    clip: float = option(0.2, "policy ratios are clipped to 1 +- this [PPO, table 3]", above=0)
    value_clip: float = option(
        0.2,
        "most that a value may change per update before its loss is clipped [37 details]",
        above=0,
    )
    value_coef: float = option(0.1, "weight of the value loss [Ziegler]", at_least=0)

    # Optimisation.
    epochs: int = option(2, "passes over each batch; further ones are mostly clipped", at_least=1)
    minibatches: int = option(4, "optimizer steps per pass [37 details]", at_least=1)
    learning_rate: float = option(
        3e-4,
        "Adam's learning rate for the policy [37 details]; with 1e-3 the policy soon loses the "
        "gold score it had gained",
        above=0,
    )
    value_lr: float = option(
        2e-3, "Adam's learning rate for the value head, which starts at 0", above=0
    )
    adam_beta1: float = option(0.9, "Adam's decay of the mean gradient", at_least=0, below=1)
    adam_beta2: float = option(
        0.95,
        "Adam's decay of the mean squared gradient; lower than usual, as the objective changes "
        "with the policy",
        at_least=0,
        below=1,
    )
    adam_eps: float = option(1e-5, "Adam's epsilon [37 details]", above=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)

    # Limits, monitoring and logging.
    target_kl: float = option(
        0.0,
        "stop passing over a batch once KL(old policy || policy) exceeds this, in nats per "
        "token; 0: never",
        at_least=0,
    )
    early_stop: When = option(
        "before_step",
        "when that is measured: before each step, with a tolerance of 1.5 (as "
        "Stable-Baselines3 does), or after each pass (as CleanRL does)",
        choices=get_args(When),
    )
    max_update_kl: float = option(
        0.0,
        "limit of KL(old policy || policy) in an update, in nats per token; 0: none",
        at_least=0,
    )
    max_ratio: float = option(
        0.0, "limit of any token's policy ratio in an update, above 1; 0: none", at_least=0
    )
    constraint: Action = option(
        "skip", "what happens to an update beyond one of these two limits", choices=ACTIONS
    )
    kl_budget: float = option(
        0.0, "KL beyond which the monitor warns, in nats per answer; 0: none", at_least=0
    )
    log_to: str = option(
        "none",
        "a dashboard to write to, beside metrics.jsonl and audit.jsonl; its package must be "
        "installed",
        choices=("none", "tensorboard", "wandb", "mlflow"),
    )
    metric_names: str = option(
        "kl_kernels", "whose names the metrics have there", choices=tuple(NAMES)
    )

    checkpoint_every: int = option(1, "updates between checkpoints", at_least=1)

    def __post_init__(self) -> None:
        fields = dataclasses.fields(self)
        for f in fields:
            value = _typed(f.name, getattr(self, f.name), type(f.default))
            object.__setattr__(self, f.name, value)
        self._check_estimator()
        for f in fields:
            _check(f.name, getattr(self, f.name), **f.metadata["limits"])
        if self.hidden_size % 8:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of 8: four heads, "
                "each of even width"
            )
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of minibatches, "
                f"{self.minibatches}"
            )
        if self.prompt_tokens + self.answer_tokens > self.context and not self.model:
            raise ValueError(
                f"context is {self.context}; it must hold prompt_tokens + answer_tokens, "
                f"{self.prompt_tokens} + {self.answer_tokens}"
            )
        if self.controller != "fixed" and self.kl_coef == 0:
            raise ValueError("kl_coef is 0, which cannot adapt; use controller fixed with it")
        if self.controller == "adaptive" and self.kl_horizon < self.batch_size:
            raise ValueError(
                f"kl_horizon is {self.kl_horizon}; it must be at least batch_size, "
                f"{self.batch_size}, or beta swings from update to update"
            )
        if self.overlong_buffer > self.answer_tokens:
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer}; it must be at most answer_tokens, "
                f"{self.answer_tokens}"
            )
        self.update_constraint()

    def _check_estimator(self) -> None:
        """Refuse estimators whose expected policy gradient is not the KL's.

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

    def kl_early_stop(self) -> KLEarlyStop | None:
        return KLEarlyStop(self.target_kl, when=self.early_stop) if self.target_kl else None

    @property
    def adapter_rank(self) -> int | None:
        """Rank of the adapter that is trained; None: the model is trained itself."""
        return self.lora_rank if self.reference == "adapter" else None

    @property
    def kl_in_loss(self) -> bool:
        """Tell whether the loss holds a differentiable KL."""
        shared = self.kl_estimator == "exact" and self.exact_kl_gradient == "loss"
        return self.kl_in == "loss" or shared

    @property
    def corrects_advantages(self) -> bool:
        """Tell whether the KL's gradient at the sampled token comes through its advantage."""
        return self.kl_in == "reward" and not self.kl_in_loss

    def subset(self, kind: type[Subset]) -> Subset:
        """Make a `kind`, a dataclass whose fields are constants or properties of this one."""
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PPOConfig:
        return cls(**json.loads(text))


def _typed(name: str, value: Any, kind: type) -> Any:
    """Make `value` a Python `kind`: a config.json may hold anything, a script NumPy's numbers."""
    if kind is float:
        return check_number(name, value)
    if kind is int:
        return check_integer(name, value)
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name} is {value!r}; it must be text without NUL")
    return value


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
        raise ValueError(f"{name} is {value}; it must be a finite number")
    if above is not None and not value > above:
        raise ValueError(f"{name} is {value}; it must be above {above}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} is {value}; it must be at least {at_least}")
    if at_most is not None and not value <= at_most:
        raise ValueError(f"{name} is {value}; it must be at most {at_most}")
    if below is not None and not value < below:
        raise ValueError(f"{name} is {value}; it must be below {below}")
