"""The one error type that a person is meant to read."""

from __future__ import annotations


class LabError(Exception):
    """A mistake in what was asked for, said in one sentence: what is wrong, where, what to change.

    The command line prints the sentence and exits with 2, without a traceback; in a notebook it is an ordinary exception.
    """
