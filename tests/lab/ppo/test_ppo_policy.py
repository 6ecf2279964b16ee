"""Sampling and scoring agree: same distribution, whatever the padding; masks end at EOS."""

import json
import shutil

import pytest
import torch

from kl_kernels.lab.ppo.model import load_model
from kl_kernels.lab.ppo.policy import (
    Policy,
    answer_texts,
    causal_lm,
    pad_left,
    sample,
    through_first_eos,
)


def chi_square(counts, probabilities):
    """Compute Pearson's statistic and its degrees of freedom, rare tokens pooled."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    pooled = [torch.cat((t[common], t[~common].sum()[None])) for t in (counts, expected)]
    statistic = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum().item()
    return statistic, common.sum().item()


def check_first_token_distribution(lm, tokenizer):
    prompt, longer = [5, 9, 70], [8, 7, 6, 5, 4, 3]
    torch.manual_seed(1)
    drawn = sample(lm, tokenizer, [prompt] * 4000 + [longer], 1).answers[:-1]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = lm(ids).logits[0, -1].double()
    counts = torch.bincount(drawn.flatten(), minlength=len(logits)).double()
    statistic, dof = chi_square(counts, logits.softmax(-1))
    assert dof > 60, "the distribution must be wide for this to notice top-k 50"
    assert statistic < dof + 5 * (2 * dof) ** 0.5


def test_samples_follow_the_whole_distribution(tiny):
    check_first_token_distribution(*tiny)


def test_sampling_ignores_the_settings_in_the_folder(model_folder, tmp_path):
    folder = tmp_path / "opinionated"
    shutil.copytree(model_folder, folder)
    settings = {"top_k": 3, "top_p": 0.5, "temperature": 0.3, "min_p": 0.1, "typical_p": 0.3}
    settings |= {"repetition_penalty": 5.0, "min_new_tokens": 4, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    check_first_token_distribution(*load_model(folder))


def test_left_padding_changes_no_logit_and_no_value(tiny):
    lm, tokenizer = tiny
    policy = Policy(lm).double()
    torch.nn.init.normal_(policy.value_head[-1].weight)
    prompts = [[4], [7, 8, 9], [11, 12, 13, 14, 15]]
    samples = sample(lm, tokenizer, prompts, 6)
    n_answer = samples.mask.shape[1]
    logits, values = policy(samples.ids, samples.attention_mask, n_answer)
    for i, prompt in enumerate(prompts):
        length = int(samples.mask[i].sum())
        ids = torch.tensor([[*prompt, *samples.answers[i, :length].tolist()]])
        alone, value = policy(ids, torch.ones_like(ids, dtype=torch.bool), length)
        torch.testing.assert_close(logits[i, :length], alone[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(values[i, :length], value[0], rtol=0, atol=1e-12)


def test_logits_are_those_each_answer_token_was_drawn_from(tiny):
    lm, tokenizer = tiny
    samples = sample(lm, tokenizer, [[7, 8, 9]], 5)
    n_answer = samples.mask.shape[1]
    logits, _ = causal_lm(lm, samples.ids, samples.attention_mask, n_answer)
    for t in range(n_answer):
        last = lm(samples.ids[:, : 3 + t]).logits[:, -1]
        torch.testing.assert_close(logits[:, t], last, rtol=0, atol=1e-5)


def test_padding_goes_left():
    ids, mask = pad_left([[4], [7, 8, 9]], 0, torch.device("cpu"))
    assert ids.tolist() == [[0, 0, 4], [7, 8, 9]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]


def test_answers_end_with_their_first_eos():
    eos = 1
    answers = torch.tensor([[5, 1, 0, 0], [1, 1, 5, 1], [5, 6, 7, 8], [5, 6, 7, 1]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert through_first_eos(answers, eos).int().tolist() == expected


def test_texts_hold_neither_eos_nor_what_follows(tiny):
    lm, tokenizer = tiny
    samples = sample(lm, tokenizer, [[7, 8]] * 40, 12)
    ended = samples.answers == tokenizer.eos_token_id
    assert ended.any(), "no sample ended early"
    for ids, text in zip(samples.answers.tolist(), answer_texts(samples, tokenizer)):
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        assert text == tokenizer.decode(ids[:end], skip_special_tokens=True)


def test_value_loss_does_not_reach_the_language_model(tiny):
    lm, _ = tiny
    policy = Policy(lm)
    torch.nn.init.ones_(policy.value_head[-1].weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    _, values = policy(ids, torch.ones_like(ids, dtype=torch.bool), 2)
    values.square().sum().backward()
    assert all(p.grad is None for p in policy.lm.parameters())
    assert policy.value_head[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_incomplete_model_folder_is_one_sentence(model_folder, tmp_path, missing):
    folder = tmp_path / "incomplete"
    shutil.copytree(model_folder, folder)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match="incomplete"):
        load_model(folder)
