"""Versions of trainers that the patches accept."""

from importlib import metadata

import pytest

from kl_kernels.integrations import openrlhf, verl
from kl_kernels.integrations.patching import UnsupportedVersionError


@pytest.mark.parametrize(("trainer", "known"), [(verl, "0.9"), (openrlhf, "0.11")])
@pytest.mark.parametrize("installed", ["0.8.1", "0.90.0", "0.12.0", "1.0"])
def test_other_versions_are_refused(monkeypatch, trainer, known, installed):
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    with pytest.raises(UnsupportedVersionError, match=rf"version {installed}.*{known}\.\*"):
        trainer.patch()


@pytest.mark.parametrize("trainer", [verl, openrlhf])
def test_a_trainer_that_is_not_there_is_named(monkeypatch, trainer):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(UnsupportedVersionError, match="is not installed"):
        trainer.patch(backend="reference")
