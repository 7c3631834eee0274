"""Configure the documentation: Markdown pages by MyST, API pages by autodoc; `make docs` builds them."""

import easydel

project = "EasyDeL DPO"
author = "the EasyDeL DPO authors"
version = release = easydel.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {release}"

# Links such as metrics.md#accuracy go to headings, on the site as on the code host.
myst_heading_anchors = 3

# `name` in a docstring is code, and a link where there is a page for it.
default_role = "py:obj"
# Options and losses make sense in the order they are written in.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False


def setup(app):
    """Keep the text below a field unchanged: napoleon would read "Meaning: more of it" there as "type: meaning"."""
    as_written = {}

    def remember(app, what, name, obj, options, lines):
        if what == "attribute":
            as_written[name] = list(lines)

    def put_back(app, what, name, obj, options, lines):
        if what == "attribute":
            lines[:] = as_written[name]

    app.connect("autodoc-process-docstring", remember, priority=400)
    app.connect("autodoc-process-docstring", put_back, priority=600)
