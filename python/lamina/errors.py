"""The exceptions lamina raises beyond Python's own."""


class FormatError(ValueError):
    """A file is truncated, foreign, damaged or from a newer version of lamina; nothing was changed."""


class PlanError(ValueError):
    """A model has no plan, or a plan was not made for these inputs; nothing was changed."""
