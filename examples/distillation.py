"""On-policy distillation: a student learns from its teacher on samples of its own.

The loss is KL(student || teacher) of each token: exact, from logits (`kl_from_logits`) or from
hidden states and output layers (`kl_without_logits`, the same with no logits in full); or of what a
server tells of its teacher, the log-probabilities of a few tokens (`kl_from_top_k`).
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kl_kernels import linear_token_kl, token_kl, topk_kl

VOCAB, BATCH, PROMPT_TOKENS, ANSWER_TOKENS = 16, 64, 4, 16
BEFORE = slice(PROMPT_TOKENS - 1, -1)  # the positions that each answer token is drawn from


def language_model(width, initializer_range):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=initializer_range,
        eos_token_id=None,  # every answer has all its tokens
    )
    return LlamaForCausalLM(config).eval()


def kl_from_logits(teacher, student, ids):  # [B, P + T] -> [B, T]
    logits, teacher_logits = student(ids).logits[:, BEFORE], teacher(ids).logits[:, BEFORE]
    return token_kl(logits, teacher_logits, ids[:, PROMPT_TOKENS:]).kl


def kl_without_logits(teacher, student, ids):  # [B, P + T] -> [B, T]
    return linear_token_kl(
        student.model(ids).last_hidden_state[:, BEFORE],
        student.lm_head.weight,
        teacher.model(ids).last_hidden_state[:, BEFORE],
        teacher.lm_head.weight,
        ids[:, PROMPT_TOKENS:],
    ).kl


def kl_from_top_k(teacher, student, ids, k=4):  # [B, P + T] -> [B, T]
    logprobs, tokens = teacher(ids).logits[:, BEFORE].log_softmax(-1).topk(k)
    return topk_kl(student(ids).logits[:, BEFORE], tokens, logprobs, beta=1.0)


def train(steps=60, kl_to_teacher=kl_from_logits, seed=0):
    torch.manual_seed(seed)
    teacher = language_model(width=64, initializer_range=0.2).requires_grad_(False)
    student = language_model(width=32, initializer_range=0.02)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    history = []
    for step in range(steps):
        prompts = torch.randint(VOCAB, (BATCH, PROMPT_TOKENS))
        ids = student.generate(prompts, do_sample=True, top_k=0, max_new_tokens=ANSWER_TOKENS)
        loss = kl_to_teacher(teacher, student, ids).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        print(f"step {step:3d}  KL(student || teacher) {history[-1]:.3f} nats per token")
    return history


if __name__ == "__main__":
    train()
