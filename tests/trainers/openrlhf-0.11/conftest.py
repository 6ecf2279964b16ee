"""OpenRLHF without what it needs CUDA, a cluster or a server for: those packages are empty here."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

EMPTY = (
    "aiohttp",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "fastapi",
    "flash_attn",
    "pylatexenc",
    "ray",
    "torchdata",
    "uvicorn",
    "vllm",
)
# Asked for by log_probs_from_logits, which has another way where there is none.
ABSENT = "flash_attn.ops"


class _Empty(MetaPathFinder, Loader):
    """Finds any module of these packages, and in it any name that is asked for."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EMPTY and not name.startswith(ABSENT):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__getattr__ = _anything
        return module

    def exec_module(self, module):
        pass


def _anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()


# First, before installed packages: `datasets` may be one of them, in some version.
sys.meta_path.insert(0, _Empty())
