"""Show the examples of docstrings as code: mkdocstrings looks for ``Examples``, and ours are called ``Example``."""

import griffe


class ExampleSections(griffe.Extension):
    """Read ``Example:`` as ``Examples:``."""

    def on_instance(self, *, obj: griffe.Object, **others: object) -> None:
        """Rename the section of one docstring."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
