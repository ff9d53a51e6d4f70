"""Figures as a notebook's file holds them: pictures that every viewer shows, small, transparent, the same bytes each time."""

import base64
import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from longcat_lab.notebook.style import COLOURS, bundle, style


def lines():
    with style():
        figure = Figure(figsize=(6, 3))
        axes = figure.add_subplot()
        for index, colour in enumerate(COLOURS):
            axes.plot(range(50), np.sin(np.arange(50) / 5) + index, color=colour, linewidth=4, label=colour)
        axes.legend()
    return figure


def shades():
    with style():
        figure = Figure(figsize=(6, 3))
        figure.add_subplot().imshow(np.linspace(0, 1, 4000).reshape(40, 100), cmap="cividis", interpolation="nearest")
    return figure


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGBA"))


def test_an_output_has_pictures_and_words_and_no_html_that_viewers_would_take_before_them():
    data, metadata = bundle(lines(), 'Six lines, "one" a colour')
    assert sorted(data) == ["image/png", "image/svg+xml", "text/plain"]
    assert data["image/svg+xml"].startswith('<svg role="img" aria-label="Six lines, &quot;one&quot; a colour"')
    assert "xmlns=" in data["image/svg+xml"][:600]  # a page shows it as a file of its own
    assert data["text/plain"] == metadata["image/png"]["alt"] == 'Six lines, "one" a colour'
    assert len(data["image/png"]) < 40_000
    height, width = pixels(data).shape[:2]
    assert (metadata["image/png"]["width"], metadata["image/png"]["height"]) == pytest.approx((width / 1.5, height / 1.5), abs=1)
    assert bundle(lines(), 'Six lines, "one" a colour') == (data, metadata)


def test_the_small_picture_is_transparent_and_has_the_colours_of_the_palette():
    drawn = pixels(bundle(lines(), "lines")[0])
    assert (drawn[:3, :3, 3] == 0).all()
    opaque = drawn[drawn[..., 3] > 250][:, :3].astype(int)
    for colour in COLOURS:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(opaque - wanted).max(axis=1).min() <= 2


def test_a_map_keeps_its_shades():
    drawn = pixels(bundle(shades(), "shades")[0])
    assert len({tuple(each) for each in drawn.reshape(-1, 4)}) > 256
