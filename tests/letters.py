"""Whether a picture can be read on a phone."""

from matplotlib.text import Text

PIXELS_WIDE, PIXELS_HIGH = 400, 8


def check_letters(figure):
    """Letters are more than 8 pixels high at a width of 400; a point is 1/72 inch."""
    pixels_per_point = PIXELS_WIDE / figure.get_size_inches()[0] / 72
    for text in figure.findobj(Text):
        if text.get_text().strip():
            assert text.get_fontsize() * pixels_per_point > PIXELS_HIGH, text.get_text()
