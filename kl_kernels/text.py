"""Text from elsewhere, such as a model's answers, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Escape everything in `text` but visible characters, spaces and ends of lines.

    Sampled bytes can spell a terminal's commands (ESC ] 0 ; sets its title, others clear it or
    write into its input), and invisible characters can reverse the order in which text is read.
    They become \x1b, \u202e and the like.
    """
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
