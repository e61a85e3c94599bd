"""vmdeck's own dark theme: a quiet ground, one colour a meaning."""

from __future__ import annotations

from textual.theme import Theme

VMDECK = Theme(
    name="vmdeck",
    primary="#6ea8d8",
    secondary="#8f9bb3",
    accent="#d9a0f3",
    foreground="#cdd3de",
    background="#12151c",
    surface="#171b24",
    panel="#222836",
    success="#8fce7e",
    warning="#e8b866",
    error="#f0717b",
    dark=True,
    variables={
        "footer-background": "#171b24",
        "footer-key-foreground": "#e8b866",
        "footer-description-foreground": "#a5aebd",
        "footer-item-background": "#171b24",
        "block-cursor-background": "#6ea8d8",
    },
)
