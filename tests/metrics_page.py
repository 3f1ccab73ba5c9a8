"""What a metrics page says."""


def sample_of(page: str, line: str) -> float:
    """Value of one sample, named with its labels; 0 if it is not there."""
    for row in page.splitlines():
        if row.startswith(line + " "):
            return float(row.rpartition(" ")[2])
    return 0.0
