"""How numbers, times, sizes and texts are written for people; nothing here fails on an odd value."""

import math
import re
from datetime import datetime
from typing import Any

NOT_RECORDED = "not recorded"


def is_number(value: Any) -> bool:
    """Whether `value` is a real number (a bool is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_count(value: Any) -> str:
    """`1234567` as `1,234,567`."""
    if is_number(value) and math.isfinite(value) and value == int(value):
        return f"{int(value):,}"
    return format_value(value)


def format_decimal(value: Any, digits: int = 4) -> str:
    """A metric with a fixed number of decimals."""
    return f"{value:,.{digits}f}" if is_number(value) else format_value(value)


def format_signed(value: Any, digits: int = 4) -> str:
    """A difference, always with its sign."""
    return f"{value:+.{digits}f}" if is_number(value) else format_value(value)


def format_percent(value: Any, digits: int = 2) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.{digits}f} %" if is_number(value) else format_value(value)


def format_flops(value: Any) -> str:
    """`1872795e12` as `1.872795e18`."""
    if not is_number(value) or not math.isfinite(value):
        return format_value(value)
    mantissa, exponent = f"{value:.6e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def format_duration(seconds: Any) -> str:
    """`12.3 s`, `4.5 min` or `3 h 15 min`; never rounded up into the next unit."""
    if not is_number(seconds) or not math.isfinite(seconds):
        return format_value(seconds)
    if seconds < 60:
        return f"{min(seconds, 59.9):.1f} s"
    if seconds < 3600:
        return f"{min(seconds / 60, 59.9):.1f} min"
    hours, minutes = divmod(int(seconds // 60), 60)
    return f"{hours:,} h {minutes} min"


def format_bytes(value: Any) -> str:
    """A number of bytes in KiB, MiB or GiB; MiB up to 10 GiB, so that close values can be told apart."""
    if not is_number(value) or not math.isfinite(value):
        return format_value(value)
    for unit, size, limit in (("bytes", 1, 1024), ("KiB", 2**10, 2**20), ("MiB", 2**20, 10 * 2**30)):
        if value < limit:
            return f"{value / size:,.{0 if size == 1 else 1}f} {unit}"
    return f"{value / 2**30:,.1f} GiB"


def format_money(value: float) -> str:
    """US dollars and cents."""
    return f"${value:,.2f}"


def format_time(value: Any) -> str:
    """An ISO time stamp as `2025-10-27 01:25:05`, without the fraction and the zone."""
    try:
        return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError):
        return format_value(value)


def format_value(value: Any) -> str:
    """Any recorded value: counts with commas, four decimals where they are exact, long hashes cut short."""
    if value is None:
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if value == round(value, 4) and abs(value) < 1e12 else f"{value:.6g}"
    if isinstance(value, list | tuple):
        return clip_text(", ".join(format_value(item) for item in value), 300)
    if isinstance(value, dict):
        return clip_text(", ".join(f"{key}: {format_value(item)}" for key, item in value.items()), 300)
    return shorten_hash(str(value))


def format_named(name: str, value: Any) -> str:
    """A value written the way its key says: `*_flops`, `*seconds`, `*memory_bytes`, `mfu`, else any value."""
    for ending, formatter in (
        ("flops", format_flops),
        ("flops_per_token", format_flops),
        ("per_second", format_count_rounded),
        ("seconds", format_duration),
        ("memory_bytes", format_bytes),
        ("mfu", format_percent),
        ("started", format_time),
        ("finished", format_time),
    ):
        if name.endswith(ending):
            return formatter(value)
    return format_value(value)


def format_count_rounded(value: Any) -> str:
    """A rate, where fractions mean nothing from 100 on."""
    return f"{value:,.{0 if abs(value) >= 100 else 1}f}" if is_number(value) else format_value(value)


def shorten_hash(text: str) -> str:
    """The first 12 digits of a hexadecimal hash; other text unchanged."""
    return text.removeprefix("sha256:")[:12] if re.fullmatch(r"(sha256:)?[0-9a-f]{16,}", text) else text


def clip_text(text: str, limit: int) -> str:
    """At most `limit` characters, and how many there were if some are left out."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def show_controls(text: str) -> str:
    """Text in which control characters, text-direction overrides and lone surrogates are visible as `\\x1b`."""
    text = text.replace("\r\n", "\n")
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]",
        lambda found: ascii(found.group())[1:-1],
        text,
    )
