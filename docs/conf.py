"""Sphinx reads the Markdown of this folder; warnings are errors (make docs)."""

import cabochon

project = "cabochon"
copyright = "the cabochon authors"
author = "the cabochon authors"
release = version = cabochon.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = "cabochon"
html_static_path = []
