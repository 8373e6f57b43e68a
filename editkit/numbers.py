"""Numbers for people: how a value is written, and which values are numbers at all."""

import math


def number(value: float | None, digits: int = 4) -> str:
    """A value for people: whole numbers whole, others to `digits` significant digits, – for none.

    >>> [number(x) for x in (0.9540259, 0.00013303, 1.44e-7, 40960, 17903.03, 2.0, None)]
    ['0.954', '0.000133', '1.44e-07', '40,960', '17,903', '2', '–']
    """
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-4:
        return f"{value:.{digits - 1}g}"
    if value == int(value) or size >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def mean(value: float | None) -> str:
    """A mean in a column of means: three decimals, as papers print them, unless that would be 0.000 or hide digits.

    >>> [mean(x) for x in (1.0, 0.98765, 0.0, 0.00013303, 6.2612, 626.12)]
    ['1.000', '0.988', '0.000', '0.000133', '6.261', '626.1']
    """
    shown = value is not None and math.isfinite(value) and abs(value) < 10 and (abs(value) >= 5e-4 or value == 0)
    return f"{value:.3f}" if shown else number(value)


def finite(value: object) -> float | None:
    """The number, None for anything else: null, NaN, text."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]
