"""Readable quantities: numbers of things, durations, p-values and bytes; and choices."""

from collections.abc import Sequence


def counted(number: int, thing: str) -> str:
    """Write ``1 run``, ``2 runs`` or ``12,000 classes``; ``thing`` is one of them."""
    several = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else several}"


def duration(seconds: float) -> str:
    """Write a duration as ``40 s``, ``12 min``, ``2 h 05 min`` or ``3 d 04 h``, rounded."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def short(number: float) -> str:
    """Write a number in three digits, or in whole ones where it is larger: ``0.318``, ``25.1``, ``7820``."""
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"


def p_value(p: float) -> str:
    """Write a p-value in three decimals, as ``0.031`` or ``<0.001``."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def size(count: float) -> str:
    """Write a number of bytes as ``512 MiB`` or ``1.5 GiB``."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def either(choices: Sequence[str]) -> str:
    """Write ``a``, ``a or b`` or ``a, b, or c``."""
    *others, last = choices
    return f"{', '.join(others)}{',' * (len(others) > 1)} or {last}" if others else last
