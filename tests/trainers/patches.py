"""What is asked of every trainer's patch, and of the page that tells how to apply it."""

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


def check_same_step(ours, theirs):
    """What a step gives by name, "gradient" among it, with the patch and without."""
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert theirs["gradient"].abs().max() > 1e-3


def code_of(request, page):
    """The one block of a how-to page that is not run by the documents' own tests."""
    text = (request.config.rootpath / "docs" / "how-to" / page).read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return code
