"""The operators as Triton kernels."""


def unavailable_reason() -> str | None:
    return "is not built"
