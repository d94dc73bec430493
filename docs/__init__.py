"""The documentation, and what makes its reference pages out of the code (``python -m docs.generate``)."""
