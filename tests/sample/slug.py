"""Turns a title into a part of a URL."""


def slug(title):
    return title.replace(" ", "-")
