"""The page's colours, shapes and fonts, as a Gradio theme; `style.css` does what a theme cannot."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes.utils import colors, sizes

_FOLDER = Path(__file__).parent
STYLE = (_FOLDER / "style.css").read_text(encoding="utf-8")

_CORAL = colors.Color(
    name="coral",
    c50="#fff4f0",
    c100="#ffe5dc",
    c200="#ffc9b8",
    c300="#ffa588",
    c400="#fb7f5a",
    c500="#ec5f38",
    c600="#d24621",
    c700="#ae3719",
    c800="#8c2f19",
    c900="#742b1a",
    c950="#3f130a",
)
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
#: Theme variables of Gradio, `…_dark` for the dark mode.
_VARIABLES = {
    "body_text_color_subdued": "#736c66",
    "body_text_color_subdued_dark": "#a8a29e",
    "body_background_fill": "#f7f5f2",
    "body_background_fill_dark": "#131210",
    "background_fill_primary": "#ffffff",
    "background_fill_primary_dark": "#1c1a18",
    "background_fill_secondary": "#f7f5f2",
    "background_fill_secondary_dark": "#171513",
    "block_background_fill": "#ffffff",
    "block_background_fill_dark": "#1c1a18",
    "block_border_width": "1px",
    "block_border_color": "#e8e4df",
    "block_border_color_dark": "#2e2a27",
    "border_color_primary": "#e8e4df",
    "border_color_primary_dark": "#2e2a27",
    "block_label_background_fill": "transparent",
    "block_label_background_fill_dark": "transparent",
    "block_label_border_width": "0px",
    "block_label_text_color": "*neutral_500",
    "block_label_text_color_dark": "*neutral_400",
    "block_title_text_weight": "500",
    "block_shadow": "none",
    "input_background_fill": "#f7f5f2",
    "input_background_fill_dark": "#24211e",
    "button_large_radius": "*radius_lg",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_background_fill_dark": "*primary_600",
    "button_primary_background_fill_hover_dark": "*primary_500",
    "button_primary_text_color": "#ffffff",
    "button_secondary_background_fill": "#ffffff",
    "button_secondary_background_fill_hover": "#f2eee9",
    "button_secondary_background_fill_dark": "#24211e",
    "button_secondary_background_fill_hover_dark": "#2e2a27",
    "button_secondary_border_color": "#ddd7d0",
    "button_secondary_border_color_dark": "#3a3531",
    "button_border_width": "1px",
    "button_border_width_dark": "1px",
    "button_primary_border_color": "transparent",
    "button_primary_border_color_dark": "transparent",
    "slider_color": "*primary_500",
}


class MetaAuxTheme(gr.themes.Base):
    """Warm greys with a coral accent, system fonts, light and dark."""

    def __init__(self) -> None:
        super().__init__(
            primary_hue=_CORAL,
            secondary_hue=_CORAL,
            neutral_hue=colors.stone,
            text_size=sizes.text_md,
            spacing_size=sizes.spacing_md,
            radius_size=sizes.radius_lg,
            font=_FONTS,
            font_mono=("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"),
        )
        self.name = "metaaux"
        self.set(**_VARIABLES)
