"""How a width multiplier turns into a number of channels."""


def scaled(channels: int, width: float) -> int:
    """`channels * width` rounded to the nearest whole number of channels, at least 1."""
    return max(1, round(channels * width))
