"""The rounding of all metrics in git: another processor's last digits then show no change."""

SIGNIFICANT_DIGITS = 6


def rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
