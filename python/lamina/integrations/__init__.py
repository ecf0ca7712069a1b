"""Doors into other libraries. Each module imports its library only when it is used."""

from lamina.integrations import transformers

__all__ = ["transformers"]
