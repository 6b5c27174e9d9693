"""Subjects: what is one, and which pattern matches which."""

import re

_SUBJECT = re.compile(r"[^\s.]+(?:\.[^\s.]+)*")


def check_subject(subject: str) -> None:
    """Raise ``ValueError`` unless ``subject`` is tokens joined by single dots."""
    if not _SUBJECT.fullmatch(subject):
        raise ValueError(f"not a subject: {subject!r}")


def check_pattern(pattern: str) -> None:
    """Raise ``ValueError`` unless ``pattern`` is a subject in which ``*`` and ``>`` stand alone."""
    check_subject(pattern)
    tokens = pattern.split(".")
    for index, token in enumerate(tokens):
        is_last = index == len(tokens) - 1
        if (">" in token and (token != ">" or not is_last)) or ("*" in token and token != "*"):
            raise ValueError(f"misplaced wildcard in subject {pattern!r}")


def matches(pattern: str, subject: str) -> bool:
    """Whether ``subject`` is one of those ``pattern`` stands for."""
    wanted, tokens = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(tokens) <= len(wanted):
            return False
        tokens = tokens[: len(wanted)]
    return len(wanted) == len(tokens) and all(
        want in ("*", token) for want, token in zip(wanted, tokens, strict=True)
    )
