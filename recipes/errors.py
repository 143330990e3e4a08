"""The error that a user can correct, for what imports it from here."""

from data.errors import InputError as InputError
