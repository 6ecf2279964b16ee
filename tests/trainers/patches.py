"""Checks of every trainer's patch, and of the page that tells how to apply it."""

import re

import torch


def check_undo(make_patch, places):
    """A patch replaces what `places` names, {module: names}, and undoing it puts all of it back."""
    originals = {(m, name): getattr(m, name) for m, names in places.items() for name in names}
    patch = make_patch()
    for (module, name), original in originals.items():
        assert getattr(module, name) is not original, name
    patch.undo()
    for (module, name), original in originals.items():
        assert getattr(module, name) is original, name


def check_same_steps(ours, theirs):
    """Compare several steps' results by name, with the patch and without.

    They include "gradient", which must not be 0, and "kl_coef", which must change at each step:
    controllers may keep it in another type than the one it began with.
    """
    assert len(ours) == len(theirs) >= 3
    for i, (of_step, of_theirs) in enumerate(zip(ours, theirs)):
        for name, value in of_theirs.items():
            torch.testing.assert_close(
                of_step[name],
                value,
                atol=1e-6,
                rtol=1e-4,
                msg=lambda m, i=i, n=name: f"step {i}, {n}: {m}",
            )
        assert of_theirs["gradient"].abs().max() > 1e-3
    assert len({float(step["kl_coef"]) for step in theirs}) == len(theirs)


def code_of(request, page):
    """The one block of a how-to page that is not run by the documents' own tests."""
    text = (request.config.rootpath / "docs" / "how-to" / page).read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return code
