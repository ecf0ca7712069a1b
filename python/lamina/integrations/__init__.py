"""Doors into other libraries. Each module imports its library only when it is used."""

from lamina.integrations import sdpa, transformers

__all__ = ["sdpa", "transformers"]
