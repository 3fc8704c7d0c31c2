"""The rounding of all metrics in git: the last digits, which differ between processors, then make no difference."""

SIGNIFICANT_DIGITS = 6


def rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
