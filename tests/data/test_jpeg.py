import numpy as np
import pytest

from data.decode import BadImage, Picture, decode
from data.jpeg import only_rows, read_header

H, W = 200, 150
KINDS = {
    "plain": {},
    "rows end in restart markers": {"restart_marker_rows": 1},
    "optimised, with restart markers": {"restart_marker_rows": 1, "optimize": True},
    "full colour resolution": {"subsampling": 0, "restart_marker_rows": 1},
    "half colour resolution": {"subsampling": 1, "restart_marker_rows": 1},
    "restarts that are not rows": {"restart_marker_blocks": 3},
    "progressive": {"progressive": True},
}


@pytest.fixture(params=[*KINDS, "grey"])
def jpeg(request, photo, encode):
    pixels = photo(H, W, 3)
    return (
        encode(pixels[..., 0], restart_marker_rows=1)
        if request.param == "grey"
        else encode(pixels, **KINDS[request.param])
    )


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("top", "bottom"), [(0, 1), (0, 1000), (3, 17), (16, 32), (40, 90), (95, 96), (150, 200), (199, 200)]
)
def test_the_rows_asked_for_are_those_of_the_whole_picture(jpeg, reduction, top, bottom):
    whole = Picture(jpeg).decode(reduction, smooth_colours=False)
    top, bottom = min(top // reduction, len(whole) - 1), min(-(-bottom // reduction), len(whole))
    rows, first = Picture(jpeg).decode_rows(reduction, top, bottom)
    assert np.array_equal(rows[top - first : bottom - first], whole[top:bottom])


def test_rows_are_left_out(photo, encode):
    plain, restarts = (encode(photo(H, W, 3), **KINDS[kind]) for kind in ("plain", "rows end in restart markers"))
    below, first, height = only_rows(plain, read_header(plain), 100, 120)
    assert (first, height) == (0, 128)
    assert len(below) == len(plain)
    cut, first, height = only_rows(restarts, read_header(restarts), 100, 120)
    assert (first, height) == (96, 32)
    assert len(cut) < len(restarts) / 2
    assert decode(cut).shape == (32, W, 3)


@pytest.mark.parametrize("kind", ["plain", "rows end in restart markers"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_truncated_pictures_are_refused_whatever_rows_are_asked_for(photo, encode, kind, share):
    data = encode(photo(H, W, 3), **KINDS[kind])
    with pytest.raises(BadImage):
        Picture(data[: int(len(data) * share)]).decode_rows(1, 0, 16)


def test_bytes_behind_the_end_and_lost_markers_do_no_harm(photo, encode):
    data = encode(photo(H, W, 3), restart_marker_rows=1)
    whole = Picture(data).decode(1, smooth_colours=False)
    rows, first = Picture(data + b"trailing \xff\xd3 bytes").decode_rows(1, 100, 200)
    assert np.array_equal(rows[100 - first :], whole[100:])
    lost = data.replace(b"\xff\xd2", b"\x00\x00", 1)
    try:
        rows, first = Picture(lost).decode_rows(1, 40, 200)
        assert rows.shape[1] == W
    except BadImage:
        pass
