"""How Sphinx builds the site: ``make docs``. Every warning is an error there, links that lead nowhere included."""

project = "Letheon"
html_title = "Letheon"
language = "en"
root_doc = "index"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 4  # named as GitHub names them, so that a link holds in the repository and on the site
smartquotes = False  # commands are to be copied

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "../app/console/static/icon.svg"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
pygments_style = "default"
pygments_dark_style = "github-dark"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0f5f6b", "color-brand-content": "#0f5f6b"},
    "dark_css_variables": {"color-brand-primary": "#7cc9d3", "color-brand-content": "#7cc9d3"},
}
