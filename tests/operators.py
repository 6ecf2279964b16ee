"""Arguments of operators, by name; what a test does not give is neutral."""

from kl_kernels.schemas import OPERATORS

NEUTRAL = {"temperature": 1.0, "ref_temperature": 1.0, "part": False}


def arguments(operator, **given):
    """The class of arguments of `operator`: no temperature, no softcap, no mask, no gradient."""
    cls = OPERATORS[operator].args
    unknown = given.keys() - set(cls._fields)
    assert not unknown, (operator, unknown)
    return cls(**{field: given.get(field, NEUTRAL.get(field)) for field in cls._fields})
