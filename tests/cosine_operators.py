"""The operators of PEMT's cosines, called with what does not fit: the same on any device."""

import pytest

NAMES = {
    "cosines": ("f", "seen", "hidden", "rotations", "scales"),
    "cosines_backward": (
        "dcosines", "df_given", "f", "seen", "hidden", "grams", "scales", "cosines", "norms",
        "f_norm", "df", "dhidden",
    ),
}  # fmt: skip
CHANGES = ("shorter", "dtype", "strides")


def assert_refused(operators, operator, arguments, change):
    """Each argument, changed alone, is refused before anything is read or written."""
    for position, (name, t) in enumerate(zip(NAMES[operator], arguments, strict=True)):
        if name == "f" and operator == "cosines" and change == "shorter":
            continue  # of any width
        if change == "shorter":
            bad = t[..., :-1].contiguous()
        elif change == "dtype":
            bad = t.double()
        elif t.dim() > 1 and name not in ("f", "df_given"):  # rows of any stride
            bad = t.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            continue
        with pytest.raises(RuntimeError):
            getattr(operators, operator)(*arguments[:position], bad, *arguments[position + 1 :])
