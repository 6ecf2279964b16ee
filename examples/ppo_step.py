"""One PPO step, all of it: rollout, shaped rewards, advantages, losses, adaptive penalty."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kl_kernels

PAD, EOS, VOCAB = 0, 2, 64
BATCH, PROMPT_TOKENS, ANSWER_TOKENS = 64, 4, 16
BEFORE = slice(PROMPT_TOKENS - 1, -1)  # the positions that each answer token is drawn from
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=PAD,
)


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lm = LlamaForCausalLM(CONFIG)
        self.value_head = torch.nn.Linear(CONFIG.hidden_size, 1)

    def forward(self, ids):  # [B, P + T] -> logits [B, T, V], values [B, T]
        output = self.lm(ids, output_hidden_states=True)
        hidden = output.hidden_states[-1][:, BEFORE].detach()
        return output.logits[:, BEFORE], self.value_head(hidden).squeeze(-1)


def even_tokens(answers, mask):  # [B, T] -> [B]
    return ((answers % 2 == 0) & mask).sum(1) / ANSWER_TOKENS


def ppo_step(step, policy, reference, optimizer, controller, early_stop, monitor):
    with torch.no_grad():
        prompts = torch.randint(EOS + 1, VOCAB, (BATCH, PROMPT_TOKENS))
        ids = policy.lm.generate(prompts, do_sample=True, top_k=0, max_new_tokens=ANSWER_TOKENS)
        answers = ids[:, PROMPT_TOKENS:]
        is_eos = (answers == EOS).long()
        mask = is_eos.cumsum(1) - is_eos == 0  # through the first EOS
        scores = even_tokens(answers, mask)

        logits, old_values = policy(ids)
        ref_logits, _ = reference(ids)
        rollout = kl_kernels.kl_rewards(
            logits,
            ref_logits,
            answers,
            scores,
            mask,
            kl_coef=controller.value,
            kl_estimator="exact",
        )
        advantages, returns = kl_kernels.compute_gae(rollout.rewards, old_values, mask)
        # Exact KL does not depend on the sampled token; the correction is that token's own share.
        advantages = kl_kernels.masked_whiten(advantages + rollout.advantage_correction, mask)

    for _ in range(2):
        for rows in torch.randperm(BATCH).chunk(4):
            logits, values = policy(ids[rows])
            policy_loss, metrics = kl_kernels.fused_policy_loss(
                logits, answers[rows], rollout.logprob[rows], advantages[rows], mask[rows]
            )
            value_loss, _ = kl_kernels.ppo_value_loss(
                values, old_values[rows], returns[rows], mask[rows]
            )
            if early_stop.before_step(metrics["approx_kl"]):
                break
            optimizer.zero_grad()
            (policy_loss + 0.5 * value_loss).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        if early_stop.after_epoch():
            break

    events = monitor.observe(
        step,
        kl=rollout.kl,
        entropy=rollout.entropy,
        logprob=rollout.logprob,
        reward=scores,
        mask=mask,
    )
    update = controller.update(rollout.kl, n_steps=BATCH, mask=mask)
    return scores.mean().item(), update, events


def train(steps=30, seed=0):
    torch.manual_seed(seed)
    policy = Policy().eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    controller = kl_kernels.AdaptiveKLController(0.1, target=2.0, horizon=256, unit="sequence_sum")
    early_stop = kl_kernels.KLEarlyStop(target_kl=0.03)
    monitor = kl_kernels.KLMonitor(kl_budget=6.0)
    history = []
    for step in range(steps):
        reward, update, events = ppo_step(
            step, policy, reference, optimizer, controller, early_stop, monitor
        )
        history.append((reward, update.kl))
        print(
            f"step {step:3d}  reward {reward:.2f}  KL {update.kl:.2f} nats per answer  "
            f"next beta {update.value:.3f}",
            *events,
        )
    return history


if __name__ == "__main__":
    train()
