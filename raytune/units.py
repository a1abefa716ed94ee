"""Sizes, durations and counts: parsed and printed in one way each."""

import re
from collections.abc import Mapping

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_SIZES = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes of a size such as `40GiB` or `80GB`.

    Raises:
        ValueError: if the text is not a number followed by one of the known units.
    """
    return int(_parse(text, _SIZES, "a size such as 40GiB"))


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `15m`, `90s` or `1h30m`.

    Raises:
        ValueError: if the text is not a sequence of numbers with units.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text.replace(" ", ""))
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ValueError(f"expected a duration such as 15m or 1h30m, got {text!r}")
    return sum(float(number) * _DURATIONS[unit] for number, unit in parts)


def _parse(text: str, units: Mapping[str, float], expected: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    by_lower = {unit.lower(): scale for unit, scale in units.items()}
    if not match or match.group(2).lower() not in by_lower:
        raise ValueError(f"expected {expected}, got {text!r}")
    return float(match.group(1)) * by_lower[match.group(2).lower()]


def parse_count(text: str) -> int:
    """A count such as `50M`, `1.5B` or `20000`.

    Raises:
        ValueError: if the text is no positive number, with or without one of k, M, B and T.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbBtT]?)\s*", text)
    count = round(float(match.group(1)) * _COUNTS[match.group(2).lower()]) if match else 0
    if not count:
        raise ValueError(f"expected a count such as 50M or 20000, got {text!r}")
    return count


def format_bytes(num_bytes: float) -> str:
    """`1.50 GiB`, `312 MiB`, `64.0 KiB`, `12 B`: three significant digits in the largest unit that keeps the number above one."""
    for unit, scale in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= scale:
            value = num_bytes / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def format_rate(bytes_per_s: float) -> str:
    """`320 GB/s`, `12.5 GB/s`: as networks are measured, in powers of ten."""
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def format_seconds(seconds: float) -> str:
    """`0.8s`, `42s`, `3m05s`, `2h14m`, `3d04h`."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, scale, below, below_unit in (("d", 86400, 3600, "h"), ("h", 3600, 60, "m"), ("m", 60, 1, "s")):
        if whole >= scale:
            return f"{whole // scale}{unit}{whole % scale // below:02d}{below_unit}"
    return f"{whole}s"


def format_count(count: float) -> str:
    """`950`, `12.5k`, `7.24B`: counts of tokens and parameters."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"


def format_dollars(usd: float) -> str:
    """`$0.42`, `$37.10`, `$1,284`."""
    return f"${usd:,.0f}" if usd >= 100 else f"${usd:.2f}"
