"""Numbers as a person reads them: short, with the unit that fits."""

from __future__ import annotations

GIB = 2**30
NBSP = "\N{NO-BREAK SPACE}"


def plain(value: float) -> str:
    """Return a number as 0.3, 12, 4.1k or 2.5M, or as 2e-5 where it is small."""
    if value and abs(value) < 1e-3:
        return scientific(value)
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def scientific(value: float) -> str:
    """Return a number as 1.5e-3, 5e-4 or 0."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def percent(share: float) -> str:
    """Return a share in percent: 96.3 % of 0.963."""
    return f"{share * 100:.1f}{NBSP}%"


def round_percent(share: float) -> str:
    """Return a share beside an axis: 96.3 % of 0.963, 50 % of 0.5."""
    return f"{share * 100:.3g}{NBSP}%"


def duration(seconds: float) -> str:
    """Return seconds as 2 d 3 h, 3 h 12 min, 7 min 30 s or 12 s."""
    for large, small, length, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= length:
            whole, rest = divmod(round(seconds / part) * part, length)
            return f"{whole:.0f} {large} {rest // part:.0f} {small}"
    return f"{seconds:.0f} s"
