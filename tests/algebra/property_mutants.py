"""Changes of the package, each of which must make a property fail.

python tests/algebra/property_mutants.py           # all
python tests/algebra/property_mutants.py entropy

Each change is made to a copy of the package, on which its property alone is run: a test that stays
green says nothing. Before that, all of them are run on a copy without a change.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import hypothesis  # noqa: F401  imported once, not in every child
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).parents[2]
PACKAGE = "kl_kernels"
OUTPUTS = "test_properties.py"
GRADIENTS = "test_properties_gradients.py"
RL = "test_properties_rl.py"
TRITON = "test_properties_on_triton.py"

ROW = "algebra/row.py"
EPILOGUES = "algebra/epilogues.py"
OPERATORS = "backends/reference/operators.py"


class Mutant(NamedTuple):
    tests: str  # the file of the property
    file: str  # below kl_kernels/
    old: str  # once in that file
    new: str


MUTANTS = {
    "test_a_constant_added_to_a_models_logits_changes_nothing": Mutant(
        OUTPUTS, ROW, "logprob=LN2 * (xt - s.anchor)", "logprob=LN2 * xt"
    ),
    "test_the_order_of_the_vocabulary_is_of_no_account": Mutant(
        OUTPUTS, ROW, "return w, u, w * tx", "return torch.cat((w, w[:, -1:]), -1), u, w * tx"
    ),
    "test_columns_that_both_models_rule_out_change_nothing": Mutant(
        OUTPUTS, ROW, "w * (tx - ty)).masked_fill(no_x,",
        "w * (tx - ty)).masked_fill(no_x & ~no_y,",
    ),
    "test_a_vocabulary_of_copies_has_as_many_more_choices": Mutant(
        OUTPUTS, ROW, "return w, u, w * tx", "return w / w.shape[-1], u, w * tx"
    ),
    "test_divergences_are_never_negative": Mutant(
        OUTPUTS, ROW, "(ln_sx - ln_sy)).clamp_min(0.0),\n        forward_kl",
        "(ln_sx - ln_sy)),\n        forward_kl",
    ),
    "test_entropy_is_between_those_of_a_certain_and_of_a_uniform_choice": Mutant(
        OUTPUTS, ROW, "LN2 * s.ex / s.sx)", "LN2 * s.ex)"
    ),
    "test_jsd_is_at_most_the_entropy_of_which_model_it_was": Mutant(
        OUTPUTS, "algebra/mixture.py", "return beta * self.q *", "return self.q *"
    ),
    "test_kl_is_at_least_twice_the_squared_total_variation": Mutant(
        OUTPUTS, ROW, "kl=(LN2 * s.rk", "kl=(0.5 * s.rk"
    ),
    "test_models_that_change_places_exchange_their_divergences": Mutant(
        OUTPUTS, ROW, "w * tx, reverse, forward", "w * tx, reverse, reverse"
    ),
    "test_jsd_of_equal_weights_is_symmetric": Mutant(
        OUTPUTS, "algebra/mixture.py", "of_larger, of_larger + d)", "of_larger, of_larger)"
    ),
    "test_nothing_diverges_from_itself": Mutant(
        OUTPUTS, ROW, "ref_anchor = y.amax(-1)", "ref_anchor = (y.amax(-1) - 0.1)"
    ),
    "test_events_merged_into_a_tail_diverge_less": Mutant(
        OUTPUTS, "functional/topk.py", "(p.exp() * (p - q))", "(2 * p.exp() * (p - q))"
    ),
    "test_logprob_is_minus_torchs_cross_entropy": Mutant(
        OUTPUTS, ROW, "logprob=LN2 * (xt - s.anchor)", "logprob=(xt - s.anchor)"
    ),
    "test_kl_is_cross_entropy_minus_entropy": Mutant(
        OUTPUTS, ROW, "u, w * tx, reverse", "u, w * ty, reverse"
    ),
    "test_probabilities_of_all_tokens_add_up_to_one": Mutant(
        OUTPUTS, "functional/selective.py", "(chosen - first) / temperature", "(chosen - first)"
    ),
    "test_a_row_is_the_same_bits_whatever_surrounds_it": Mutant(
        OUTPUTS, "backends/reference/rows.py", "mask.nonzero(as_tuple=True)",
        "torch.ones_like(mask).nonzero(as_tuple=True)",
    ),
    "test_a_row_is_the_same_bits_however_it_lies_in_memory": Mutant(
        OUTPUTS, "functional/arguments.py", "return logits.flatten(0, -3)",
        "return logits.as_strided(logits.shape, torch.empty(logits.shape).stride())",
    ),
    "test_parts_merge_into_the_whole_in_any_order_and_grouping": Mutant(
        OUTPUTS, ROW, "ex=ca * (s.ex - da * s.sx)", "ex=ca * s.ex"
    ),
    "test_temperature_divides_the_logits": Mutant(
        OUTPUTS, ROW, "(LOG2E / self.temperature)", "LOG2E"
    ),
    "test_k1_and_k3_are_the_exact_kl_on_average": Mutant(
        OUTPUTS, EPILOGUES, "return torch.expm1(-log_ratio) + log_ratio.",
        "return torch.expm1(log_ratio) - log_ratio.",
    ),
    "test_a_constant_added_to_a_models_logits_changes_no_gradient": Mutant(
        GRADIENTS, "backends/reference/rows.py", "from_anchor(y, ref_anchor)",
        "from_anchor(y, 0.999 * ref_anchor)",
    ),
    "test_gradients_move_along_with_their_columns": Mutant(
        GRADIENTS, OPERATORS, "(own >= 0) & (own < grad", "(own > 0) & (own < grad"
    ),
    "test_columns_that_both_models_rule_out_have_no_gradient": Mutant(
        GRADIENTS, ROW, "return torch.exp2(tx) *", "return torch.exp2(tx.clamp_min(-9)) *"
    ),
    "test_a_gradient_adds_up_to_zero_over_the_vocabulary": Mutant(
        GRADIENTS, ROW, "- g.logprob + g.forward_kl", "- g.logprob"
    ),
    "test_gradients_are_linear_in_what_comes_from_above": Mutant(
        GRADIENTS, ROW, "g.kl * (ln_sy - ln_sx - kl)", "g.kl.abs() * (ln_sy - ln_sx - kl)"
    ),
    "test_a_loss_of_part_of_a_batch_has_the_gradient_of_that_part": Mutant(
        GRADIENTS, OPERATORS, "else g[rows].double() for g in grads",
        "else g[rows].double() / len(rows[0]) for g in grads",
    ),
    "test_temperature_divides_logits_and_gradient": Mutant(
        GRADIENTS, ROW, "b=LN2 * (g.kl - g.entropy) / (temperature * sx)",
        "b=LN2 * (g.kl - g.entropy) / sx",
    ),
    "test_a_softcap_bends_logits_and_gradient": Mutant(
        GRADIENTS, ROW, "return 1.0 - torch.tanh(logits.double() / self.softcap) ** 2",
        "return 1.0 - torch.tanh(logits.double() / self.softcap) ** 4",
    ),
    "test_gradients_are_those_autograd_finds_for_the_definitions": Mutant(
        GRADIENTS, ROW, "d=g.forward_kl /", "d=g.kl /"
    ),
    "test_the_score_function_is_zero_on_average": Mutant(
        GRADIENTS, OPERATORS, "+= upstream.logprob[has] / a.temperature",
        "+= 2 * upstream.logprob[has] / a.temperature",
    ),
    "test_on_triton": Mutant(
        TRITON, "backends/triton/math.py", "logprob = tl.fma(xt, k, -s.anchor) * LN2",
        "logprob = xt * k * LN2",
    ),
    "test_rewards_add_up_to_the_score_less_the_kl": Mutant(
        RL, "rl/rewards.py", "-kl_coef * kl, 0.0)", "kl_coef * kl, 0.0)"
    ),
    "test_fused_rewards_are_those_of_the_kl_that_is_fused": Mutant(
        RL, EPILOGUES, "estimate.clamp(-kl_clip, kl_clip)", "estimate.clamp(0, kl_clip)"
    ),
    "test_with_lambda_one_values_telescope_out_of_the_returns": Mutant(
        RL, OPERATORS, "a.gamma * a.lam * next_advantage", "a.lam * next_advantage"
    ),
    "test_advantages_are_linear_in_rewards_and_values": Mutant(
        RL, OPERATORS, "delta = r[t] +", "delta = r[t].abs() +"
    ),
    "test_holes_in_a_response_are_as_if_cut_out": Mutant(
        RL, OPERATORS, "next_value[here] = torch.where(counts, v[t], next_value[here])",
        "next_value[here] = v[t]",
    ),
    "test_whitened_values_have_mean_zero_and_variance_one": Mutant(
        RL, "rl/masked.py", "moments.var())", "moments.var(unbiased=False))"
    ),
    "test_controllers_stay_in_bounds_and_push_harder_against_more_kl": Mutant(
        RL, "rl/controllers.py", "min(max(self._value * factor, self.min_coef), self.max_coef)",
        "max(self._value * factor, self.min_coef)",
    ),
    "test_controllers_rest_at_the_target_and_move_away_from_it": Mutant(
        RL, "rl/adaptive_controllers.py", "max(kl / self.target - 1,", "max(kl / self.target - 0.9,"
    ),
    "test_importance_weights_keep_their_bounds": Mutant(
        RL, "rl/importance.py", "weight.clamp(low, high)", "weight.clamp_max(high)"
    ),
    "test_aggregated_losses_are_those_of_a_loop": Mutant(
        RL, "rl/losses.py", "weights / sequences.at_tokens(sequences.sums(mask)).clamp_min(1)",
        "weights / mask.shape[1]",
    ),
    "test_k3_and_k2_are_never_negative_and_k1_changes_sign_with_the_models": Mutant(
        RL, EPILOGUES, "return torch.expm1(-log_ratio) + log_ratio.",
        "return torch.expm1(-log_ratio) + 0 * log_ratio.",
    ),
}  # fmt: skip


def stage(directory: Path) -> None:
    """A copy of what the properties need, with the kernels that are built."""
    caches = shutil.ignore_patterns("__pycache__", ".*", "*.so")
    shutil.copy(ROOT / "pyproject.toml", directory)
    for tree in ("tests", PACKAGE):
        shutil.copytree(ROOT / tree, directory / tree, ignore=caches)
    for built in (ROOT / PACKAGE).glob("*.so"):
        (directory / PACKAGE / built.name).symlink_to(built)


def run(names: list[str], mutant: Mutant | None = None) -> tuple[int, str]:
    """Pytest's exit code and what it wrote."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        stage(directory)
        if mutant is not None:
            path = directory / PACKAGE / mutant.file
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        nodes = [f"tests/algebra/{MUTANTS[name].tests}::{name}" for name in names]
        child = multiprocessing.get_context("fork").Process(
            target=run_pytest, args=(directory, nodes)
        )
        child.start()
        child.join()
        assert child.exitcode is not None
        return child.exitcode, (directory / "output").read_text()


def run_pytest(directory: Path, nodes: list[str]) -> None:
    output = os.open(directory / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(directory)
    sys.path.insert(0, str(directory))
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk"]
    sys.exit(int(pytest.main([*options, *nodes])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only properties whose names hold one of these")
    words = parser.parse_args().words or [""]
    names = [name for name in MUTANTS if any(word in name for word in words)]
    code, output = run(names)
    if code != pytest.ExitCode.OK:
        print(output, "Without a change, all properties must hold.", sep="\n")
        return 1
    n_red = 0
    for name in names:
        code, output = run([name], MUTANTS[name])
        red = code == pytest.ExitCode.TESTS_FAILED
        n_red += red
        print(f"{'red' if red else 'GREEN'}  {name}  {output.splitlines()[-1]}", flush=True)
    print(f"{n_red} of {len(names)} properties fail as they must")
    return int(n_red < len(names))


if __name__ == "__main__":
    sys.exit(main())
