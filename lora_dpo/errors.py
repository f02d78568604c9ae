"""Every error a user can meet.

A `UserError` is the user's to mend: its message names what was given, where, and what is taken instead.
The command line prints it without a traceback and exits with 2. Anything else that is raised is a bug.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; the message says how."""


class RecipeError(UserError):
    """A key or value of the recipe is wrong."""


class DataError(UserError):
    """A data file, or a row of one, cannot be used; the message names file, row and reason."""


class ModelError(UserError):
    """The base model, its tokenizer or an adapter cannot be used as asked."""


class PreflightError(UserError):
    """The checks before the first step found that training would be wrong or would not fit."""


class RunError(UserError):
    """The run directory, or a checkpoint in it, is not in the state that is needed."""
