"""Files that are read back are data: nothing in them runs, whoever wrote them."""

import ast
import itertools
import json
import os
import pickle
import shutil
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors.torch import load_file

from kl_kernels.lab.ppo.checkpoint import create_run, load_state, open_run, save_model, save_state
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.model import load_model
from kl_kernels.lab.ppo.pretrain import new_model, train_tokenizer
from kl_kernels.lab.ppo.prompts import encode_prompts
from kl_kernels.lab.ppo.report import read_metrics
from kl_kernels.lab.ppo.reward import load_reward
from kl_kernels.lab.study.plan import Plan, create_study, open_study
from kl_kernels.monitor.audit import AuditLog
from kl_kernels.monitor.chain import Head, head_path
from kl_kernels.monitor.verify import verify_log

ROOT = Path(__file__).parent.parent.parent
SOURCES = [
    *(
        path
        for folder in ("kl_kernels", "bench", "examples")
        for path in (ROOT / folder).rglob("*.py")
    ),
    ROOT / "setup.py",
]

UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
MAY_IMPORT_PICKLE = {"kl_kernels/lab/ppo/checkpoint.py"}  # for the name of an error


def dangers(source: str, path: str = "x.py") -> list[str]:
    """List the code of a module that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = None
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = {name.partition(".")[0] for name in names} & UNPICKLERS
            what = bad and not (path in MAY_IMPORT_PICKLE and bad == {"pickle"}) and "import"
        elif isinstance(node, ast.Call):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            what = (
                (called in ("eval", "exec", "compile", "builtins.eval", "builtins.exec") and last)
                or (called.startswith("pickle.") and last)
                or (called in ("os.system", "os.popen") and last)
                or (given.get("shell", "False") != "False" and "shell")
                or (given.get("allow_pickle", "False") != "False" and "allow_pickle")
                or (given.get("trust_remote_code", "False") != "False" and "trust_remote_code")
                or (called == "torch.load" and given.get("weights_only") != "True" and "torch.load")
                or (called.startswith("yaml.") and last != "safe_load" and "yaml")
                or (called == "read_pickle" or last == "read_pickle")
            )
            if last == "from_pretrained" and "FROM_DISK_ALONE" not in ast.unparse(node):
                what = "from_pretrained"
        if what:
            found.append(f"{path}:{node.lineno} {what}")
    return found


def test_no_module_can_run_what_it_reads():
    assert len(SOURCES) > 100
    found = [dangers(path.read_text(), path.relative_to(ROOT).as_posix()) for path in SOURCES]
    assert not list(itertools.chain(*found))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load(f)",
        "torch.load(f, weights_only=False)",
        "numpy.load(f, allow_pickle=True)",
        "pandas.read_pickle(f)",
        "yaml.load(f)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "AutoModel.from_pretrained(x)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_scan_sees(source):
    assert dangers(source)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture
def mark(tmp_path):
    """A file that nothing may make."""
    path = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()  # the payload does run where it is unpickled
    path.unlink()
    yield path
    assert not path.exists()


def poisoned(mark: Path, form: str) -> bytes:
    if form == "pickle":
        return pickle.dumps({"updates": Payload(mark)})
    path = mark.with_name("poison.pt")
    legacy = {"_use_new_zipfile_serialization": False} if form == "old torch" else {}
    torch.save({"updates": Payload(mark), "policy": {}}, path, **legacy)
    return path.read_bytes()


FORMS = ["pickle", "torch", "old torch"]


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_is_not_unpickled(tmp_path, mark, form):
    """Every *.pt of a run and of a study is read by `load_state`."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(poisoned(mark, form))
    with pytest.raises(ValueError, match=r"checkpoint.pt' is no file of tensors and plain values"):
        load_state(path)


def test_a_checkpoint_is_a_dict_and_a_damaged_one_is_one_sentence(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_state(path, {"a": torch.ones(3), "b": 1})
    assert load_state(path)["a"].tolist() == [1, 1, 1]
    whole = path.read_bytes()
    for damaged in (b"", b"x", whole[: len(whole) // 2], b"PK" + whole[2:100]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no file of tensors"):
            load_state(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="holds a list"):
        load_state(path)


def readers(folder: Path):
    """Every other file that is read back, and how."""
    run = create_run(folder / "run", PPOConfig())
    study = create_study(folder / "study", Plan(PPOConfig()))
    AuditLog(run.audit).close()
    return {
        "config.json": (run.config, lambda: open_run(run.path)),
        "study.json": (study.plan, lambda: open_study(study.path)),
        "metrics.jsonl": (run.metrics, lambda: read_metrics(run.metrics)),
        "audit log": (run.audit, lambda: AuditLog(run.audit)),
        "audit head": (head_path(run.audit), lambda: Head.read(run.audit)),
        "audit log and its head": (head_path(run.audit), lambda: AuditLog(run.audit)),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "study.json",
        "metrics.jsonl",
        "audit log",
        "audit head",
        "audit log and its head",
    ],
)
def test_no_other_file_is_unpickled(tmp_path, mark, name, form):
    path, read = readers(tmp_path)[name]
    path.write_bytes(poisoned(mark, form))
    with pytest.raises(ValueError, match=r"."):
        read()


@pytest.mark.parametrize("form", FORMS)
def test_checking_a_log_does_not_unpickle_it(tmp_path, mark, form):
    AuditLog(tmp_path / "log").close()
    (tmp_path / "log").write_bytes(poisoned(mark, form))
    assert not verify_log(tmp_path / "log").ok


def test_text_is_not_evaluated(tmp_path, mark):
    code = f"__import__('os').system('touch {mark}')"
    for name, (path, read) in readers(tmp_path).items():
        path.write_text(code + "\n")
        with pytest.raises(ValueError, match=r"."):
            read()
        assert not mark.exists(), name


@pytest.mark.parametrize("spec", ["../own:f", "/etc/own:f", ".own:f", "own:f.g", "a/b:f", "own:"])
def test_a_reward_is_a_module_on_the_path_and_a_name_in_it(spec):
    with pytest.raises(ValueError, match=r"^reward is .*; it must read module:function"):
        load_reward(spec)


# A model's folder.


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    tokenizer = train_tokenizer(["a b c"], 300)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lm = new_model(tokenizer, hidden_size=8, layers=1, context=64)
    save_model(folder, lm, tokenizer)
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CODE = """
open({mark!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = {model_type!r}
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("model_type", ["llama", "of-its-own"])
def test_code_in_a_model_s_folder_is_not_run(model, mark, model_type, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # consent must not be asked for, either
    code = CODE.format(mark=str(mark), model_type=model_type)
    for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py", "__init__.py"):
        (model / name).write_text(code)
    change(
        model / "config.json",
        model_type=model_type,
        auto_map={
            "AutoConfig": "configuration_own.Config",
            "AutoModelForCausalLM": "modeling_own.Model",
        },
    )
    change(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_own.Tokenizer", "tokenization_own.Tokenizer"]},
    )
    if model_type == "llama":  # transformers has that model itself
        assert type(load_model(model)[0]).__module__.startswith("transformers.")
    else:
        with pytest.raises(ValueError, match=r"^model is .*, which does not load: .*custom code"):
            load_model(model)


def test_a_chat_template_runs_in_a_sandbox(model, mark, tmp_path):
    """A template is a program of the folder's, which renders the chats of --prompts."""
    path = tmp_path / "harmless"
    template = "{{{{ cycler.__init__.__globals__.os.system('touch {}') }}}}"
    jinja2.Template(template.format(path)).render()
    assert path.exists()  # it does run outside of one
    (model / "chat_template.jinja").write_text(template.format(mark))
    tokenizer = load_model(model)[1]
    chat = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match=r"does not fit the model's chat template: .*unsafe"):
        encode_prompts([chat], tokenizer, path="", context=None, answer_tokens=40)


def test_the_code_would_run_where_it_is_trusted(model, tmp_path):
    from transformers import AutoConfig

    mark = tmp_path / "it-ran"
    (model / "configuration_own.py").write_text(CODE.format(mark=str(mark), model_type="own"))
    change(
        model / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.Config"}
    )
    AutoConfig.from_pretrained(model, trust_remote_code=True)
    assert mark.exists()


@pytest.mark.parametrize("form", FORMS)
def test_pickled_weights_do_not_load(model, mark, form):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^model is .*no weights in \*\.safetensors"):
        load_model(model)
    (model / "pytorch_model.bin").write_bytes(poisoned(mark, form))
    with pytest.raises(ValueError, match=r"^model is .*no weights in \*\.safetensors"):
        load_model(model)
    (model / "other.safetensors").write_bytes(b"")  # the check lets it pass, the loader does not
    with pytest.raises(ValueError, match=r"^model is .*, which does not load: .*safetensors"):
        load_model(model)


def test_pickled_weights_beside_safetensors_are_not_looked_at(model, mark):
    (model / "pytorch_model.bin").write_bytes(poisoned(mark, "pickle"))
    load_model(model)


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_under_the_name_of_safetensors_does_not_load(model, mark, form):
    (model / "model.safetensors").write_bytes(poisoned(mark, form))
    with pytest.raises(ValueError, match=r"^model is .*, which does not load"):
        load_model(model)


@pytest.mark.parametrize("name", ["../away/model.safetensors", "/model.safetensors", "a/b", 5])
def test_weights_are_in_the_folder_itself(model, name):
    shards = {"model.embed_tokens.weight": name}
    index = {"metadata": {}, "weight_map": shards}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"^model is .*, whose model.safetensors.index.json"):
        load_model(model)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 5}', "[" * 100_000])
def test_an_index_of_weights_that_is_none_is_refused(model, index):
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(
        ValueError, match=r"^model is .*, whose model.safetensors.index.json is not"
    ):
        load_model(model)


def test_an_adapter_does_not_send_the_loader_to_another_model(model, saved):
    (model / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(saved), "peft_type": "LORA"})
    )
    with pytest.raises(ValueError, match=r"^model is .*, which holds an adapter"):
        load_model(model)


def test_a_model_does_not_choose_a_kernel_from_the_hub(model):
    change(model / "config.json", attn_implementation="somebody/kernel")
    assert load_model(model)[0].config._attn_implementation in ("sdpa", "eager")
