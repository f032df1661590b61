"""Sphinx: every page is executed; a failing cell fails the build; nothing is fetched."""

import dualform

project = "dualform"
author = "the dualform authors"
release = version = dualform.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_render_markdown_format = "gfm"  # what cells print as Markdown has tables
nb_output_stderr = "remove"  # progress bars that miss their widget, and the like
myst_enable_extensions = ["dollarmath", "colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True
exclude_patterns = ["_build", "jupyter_execute"]


def as_written(app, what, name, obj, options, lines):
    """Show a docstring's equation, shapes and example as they are written, not as reStructuredText."""
    if any(line.strip() for line in lines[1:]):
        lines[:] = [lines[0], "", "::", "", *("   " + line for line in lines[1:]), ""]


def setup(app):
    app.connect("autodoc-process-docstring", as_written)
