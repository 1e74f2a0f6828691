"""Hidden colours and borders do not count when a photo is looked at."""

import numpy as np

from evenlight.stages.photos.visible import inside_border, visible


def picture(height: int = 120, width: int = 160) -> np.ndarray:
    return np.random.default_rng(0).integers(60, 180, (height, width, 3)).astype(np.uint8)


def cut_out(hidden: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:120, :160]
    shown = (y - 60) ** 2 + (x - 80) ** 2 < 40**2
    return np.where(shown[..., None], picture(), hidden).astype(np.uint8), shown * np.uint8(255)


def test_cut_outs_over_black_and_over_white_look_the_same():
    black, white = (visible(*cut_out(hidden), 128) for hidden in (0, 255))
    assert np.abs(black.astype(int) - white).mean() < 1


def test_hidden_pixels_are_as_bright_as_the_visible_ones():
    pixels, alpha = cut_out(0)
    assert abs(visible(pixels, alpha, 128).mean() - pixels[alpha > 0].mean()) < 3


def test_opaque_and_wholly_hidden_photos_stay():
    pixels = picture()
    for alpha in (np.full((120, 160), 255, np.uint8), np.zeros((120, 160), np.uint8)):
        assert np.array_equal(visible(pixels, alpha, 128), visible(pixels, None, 128))


def framed(level: int, top: int, left: int) -> np.ndarray:
    found = np.full((200, 240, 3), level, np.uint8)
    found[top : 200 - top, left : 240 - left] = picture(200 - 2 * top, 240 - 2 * left)
    return found


def test_a_border_on_all_sides_or_on_two_is_taken_off():
    for level in (0, 2, 253, 255):
        assert inside_border(framed(level, 20, 24)).shape[:2] == (158, 190)
        assert inside_border(framed(level, 30, 0)).shape[:2] == (138, 240)


def test_an_object_on_white_has_no_border():
    found = np.full((200, 240, 3), 255, np.uint8)
    y, x = np.mgrid[:200, :240]
    found[(y - 100) ** 2 + (x - 120) ** 2 < 60**2] = 90
    assert inside_border(found).shape == found.shape


def test_one_dark_side_is_no_border():
    photo = picture(200, 240)
    photo[:40] = 0
    assert inside_border(photo).shape == photo.shape


def test_black_and_white_photos_stay_whole():
    for level in (0, 255):
        assert inside_border(np.full((64, 64, 3), level, np.uint8)).shape == (64, 64, 3)
