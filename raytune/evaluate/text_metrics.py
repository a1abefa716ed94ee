"""Metrics of one answer against the expected one. Pure: strings in, a number out."""


def exact_match(answer: str, expected: str) -> float:
    """1 if both are the same text, leading and trailing white space aside, else 0."""
    return float(answer.strip() == expected.strip())
