"""Several processes train as one does, and only the main one writes and prints."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from micro import MICRO, run
from sharded import Sharding

from kl_kernels.cli import main
from kl_kernels.lab.ppo import ranks as ppo_ranks
from kl_kernels.lab.ppo.checkpoint import load_state, save_model
from kl_kernels.lab.ppo.model import load_model
from kl_kernels.lab.ppo.policy import sample
from kl_kernels.lab.ppo.ranks import ExponentialRace, Ranks
from kl_kernels.lab.ppo.report import read_metrics

REPOSITORY = Path(__file__).parents[3]

REWARDS = """
import os, signal, time
from pathlib import Path

def vowels(prompts, answers):
    with open(Path(__file__).parent / f"rank{os.environ.get('RANK', 0)}.txt", "a") as file:
        file.write(f"{len(answers)}\\n")
    return [sum(letter in "aeiou" for letter in answer) / 4 for answer in answers]

def bad_on_the_second(prompts, answers):
    return [None if os.environ["RANK"] == "1" else 1.0 for _ in answers]

def ctrl_c(prompts, answers):
    if int(os.environ["RANK"]) == 0:
        os.kill(os.getppid(), signal.SIGINT)  # torchrun, as the terminal does
    time.sleep(60)
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_rewards", None)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# With --cpu accelerate starts one process; --multi_gpu starts several, also without a GPU.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")


def torchrun(folder, *arguments, launcher=TORCHRUN):
    command = [sys.executable, "-m", *launcher, "-m", "kl_kernels", "ppo", *map(str, arguments)]
    path = os.pathsep.join(map(str, (REPOSITORY, folder)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def forked(folder, *arguments, sharding=False):
    """Run the command on two processes as torchrun does, without its 13 s of imports."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=folder) as shared:
        given = Path(shared), folder, arguments, sharding
        started = [context.Process(target=_rank, args=(rank, *given)) for rank in range(2)]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
            process.kill()
        streams = [
            "".join((Path(shared) / f"{name}{rank}").read_text() for rank in range(2))
            for name in ("stdout", "stderr")
        ]
    return SimpleNamespace(
        returncode=max(abs(process.exitcode) for process in started),
        stdout=streams[0],
        stderr=streams[1],
    )


def _rank(rank, shared, folder, arguments, sharding):
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(shared / f"{name}{rank}", os.O_CREAT | os.O_WRONLY), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    code = 1
    try:
        os.chdir(folder)
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= own | {"MASTER_ADDR": "localhost"}  # accelerate asks for one
        AcceleratorState._reset_state(reset_partial_state=True)  # the parent is a single process
        dist.init_process_group(
            "gloo", init_method=f"file://{shared}/store", rank=rank, world_size=2
        )
        if sharding:
            ppo_ranks.Accelerator = Sharding
        code = main(["ppo", *map(str, arguments)])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def often_ending(model_folder, folder):
    """Make EOS likely: answers differ in length, and ranks in their share of tokens."""
    lm, tokenizer = load_model(model_folder)
    with torch.no_grad():
        end = lm.get_input_embeddings().weight[tokenizer.eos_token_id]
        lm.transformer.ln_f.bias += 3 * end
    save_model(folder, lm, tokenizer)
    return folder


def assert_same_training(*folders):
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in folders)
    assert len(one) == len(two) == 4
    assert one[3]["kl"] > 1e-3, "nothing was learned"
    assert 2 < one[0]["length"] < 10, "answers hardly differ in length"
    for alone, together in zip(one, two):
        assert alone.keys() == together.keys()
        assert alone["sample"] == together["sample"]
        assert alone["violation"] is together["violation"] is None
        for name in alone.keys() - {"sample", "seconds", "gold", "violation"}:
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5), name
    states = [load_state(folder / "checkpoint.pt") for folder in folders]
    assert torch.equal(states[0]["rng"]["cpu"], states[1]["rng"]["cpu"])
    torch.testing.assert_close(states[0]["policy"], states[1]["policy"], rtol=1e-3, atol=1e-4)


def test_two_processes_train_as_one_also_when_resumed(rewards, model_folder):
    model = often_ending(model_folder, rewards / "model")
    common = [*MICRO, "--model", model, "--reward", "own_rewards:vowels"]
    common += ["--learning-rate", "3e-3", "--answer-tokens", "12"]
    assert run(*common, "--out", rewards / "one", "--updates", "4") == 0
    (rewards / "rank0.txt").unlink()
    first = torchrun(rewards, *common, "--out", "two", "--updates", "2", launcher=ACCELERATE)
    assert first.returncode == 0, first.stderr
    resumed = torchrun(rewards, "--resume", "two", "--updates", "4")
    assert resumed.returncode == 0, resumed.stderr

    assert_same_training(rewards / "one", rewards / "two")

    # Each process scored its half, and only one of them wrote and printed.
    assert [(rewards / f"rank{i}.txt").read_text() for i in (0, 1)] == ["4\n" * 4] * 2
    files = [sorted(p.name for p in (rewards / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]
    assert resumed.stdout.count("run folder: ") == resumed.stdout.count("metrics: ") == 1


def test_shards_train_as_one_process_and_resume_as_any_number_of_them(rewards, model_folder):
    """Two updates run on FSDP2's shards, one in a single process, the last on shards again."""
    model = often_ending(model_folder, rewards / "model")
    common = [*MICRO, "--model", model, "--reward", "own_rewards:vowels"]
    common += ["--learning-rate", "3e-3", "--answer-tokens", "12", "--max-update-kl", "1e9"]
    assert run(*common, "--out", rewards / "one", "--updates", "4") == 0
    first = forked(rewards, *common, "--out", "two", "--updates", "2", sharding=True)
    assert first.returncode == 0, first.stderr
    assert run("--resume", rewards / "two", "--updates", "3") == 0
    resumed = forked(rewards, "--resume", "two", "--updates", "4", sharding=True)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_training(rewards / "one", rewards / "two")
    trained = [load_model(rewards / name / "policy")[0].state_dict() for name in ("one", "two")]
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-3, atol=1e-4)


def test_ctrl_c_ends_all_processes_and_tells_how_to_go_on(rewards, model_folder):
    arguments = [*MICRO, "--model", model_folder, "--reward", "own_rewards:ctrl_c", "--out", "run"]
    ended = torchrun(rewards, *arguments)
    assert ended.returncode != 0
    assert ended.stdout.count("--resume run") == 1, ended.stderr


def test_a_bad_score_of_any_process_is_said_once(rewards, model_folder):
    """The main process prints errors, also about answers that another one has."""
    arguments = [*MICRO, "--model", model_folder, "--reward", "own_rewards:bad_on_the_second"]
    ended = forked(rewards, *arguments, "--out", "run")
    assert ended.returncode != 0
    message = "error: the reward function returned None of type NoneType for answer 0 of 4"
    assert ended.stderr.count(message) == 1, ended.stderr


def test_shares_that_are_not_equal_are_refused_in_one_sentence(tmp_path):
    ended = forked(tmp_path, "--out", "run", "--batch-size", "8", "--minibatches", "8")
    assert ended.returncode != 0
    message = "error: batch_size is 8; on 2 processes it must be a multiple of minibatches x"
    assert ended.stderr.count(message) == 1
    assert not (tmp_path / "run").exists()


def test_a_race_is_won_as_torch_multinomial_draws():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    for rows in (slice(0, 6), slice(0, 3), slice(3, 6)):
        torch.manual_seed(1)
        won = ExponentialRace(6, rows)(torch.zeros(1), logits[rows]).argmax(-1)
        assert won.tolist() == expected[rows].tolist()


def test_ranks_draw_what_longer_answers_drew(tiny, monkeypatch):
    """The ranks run one by one in a process: the longest answer of all is known beforehand."""
    lm, tokenizer = tiny
    prompts = [[4], [7, 8, 9]]
    torch.manual_seed(0)
    short, long = sample(lm, tokenizer, prompts, 12).answers.tolist()
    end = next(token for token in short if token not in long)
    monkeypatch.setattr(type(tokenizer), "eos_token_id", end, raising=False)

    torch.manual_seed(0)
    whole = sample(lm, tokenizer, prompts, 12)
    assert whole.mask.sum(1).tolist() == [short.index(end) + 1, 12]
    assert short.index(end) < 11
    state = torch.get_rng_state()
    monkeypatch.setattr(Ranks, "max", lambda self, local: torch.tensor(12))
    for ranks in (Ranks(0, 2, None), Ranks(1, 2, None)):
        torch.manual_seed(0)
        part = sample(lm, tokenizer, prompts, 12, ranks)
        assert torch.equal(torch.get_rng_state(), state)
        expected = whole.select(torch.tensor([ranks.rank]))
        assert torch.equal(part.ids, expected.ids)
        assert torch.equal(part.mask, expected.mask)
        assert torch.equal(part.attention_mask, expected.attention_mask)
