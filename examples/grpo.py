"""GRPO with an exact KL to the reference in the loss: a tiny Llama learns to write even tokens."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kl_kernels import fused_policy_loss, group_advantages

PAD, EOS, VOCAB = 0, 2, 64
PROMPTS, GROUP, PROMPT_TOKENS, ANSWER_TOKENS = 8, 8, 4, 16
BEFORE = slice(PROMPT_TOKENS - 1, -1)  # the positions that each answer token is drawn from
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=PAD,
)


def even_tokens(answers, mask):  # [B, T] -> [B]
    """The reward is a rule that can be checked: how much of the answer's budget is even tokens."""
    return ((answers % 2 == 0) & mask).sum(1) / ANSWER_TOKENS


def train(steps=40, kl_coef=0.2, seed=0):
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(CONFIG).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    history = []
    for step in range(steps):
        prompts = torch.randint(EOS + 1, VOCAB, (PROMPTS, PROMPT_TOKENS))
        # Without top_k=0, generate keeps the 50 likeliest tokens: another policy than the loss's.
        ids = policy.generate(
            prompts.repeat_interleave(GROUP, 0),
            do_sample=True,
            top_k=0,
            max_new_tokens=ANSWER_TOKENS,
        )
        answers = ids[:, PROMPT_TOKENS:]
        is_eos = (answers == EOS).long()
        mask = is_eos.cumsum(1) - is_eos == 0  # through the first EOS

        rewards = even_tokens(answers, mask)
        advantages = group_advantages(rewards, group_size=GROUP)

        loss, metrics = fused_policy_loss(
            policy(ids).logits[:, BEFORE],
            answers,
            None,  # one step per rollout: the policy is still the one that sampled
            advantages.view(-1, 1).expand_as(answers),
            mask,
            ref_logits=reference(ids).logits[:, BEFORE],
            kl_loss_coef=kl_coef,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        reward, kl = rewards.mean().item(), metrics["kl"].item()
        history.append((reward, kl))
        print(f"step {step:3d}  reward {reward:.2f}  KL to the reference {kl:.3f} nats per token")
    return history


if __name__ == "__main__":
    train()
