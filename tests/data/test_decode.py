import pickle
import struct
import time
import zlib
from contextlib import suppress
from io import BytesIO

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data.decode import BadImage, Fault, Picture
from data.jpeg import Box, read_header, with_index
from tests.data.conftest import encode, make_photo
from tests.support import decode

H, W = 61, 90


@pytest.fixture
def scene():
    return make_photo(H, W, seed=5)


def difference(ours, reference):
    assert ours.dtype == np.uint8
    assert ours.shape == np.asarray(reference).shape
    return np.abs(ours.astype(float) - np.asarray(reference)).mean()


def fault_of(data):
    with pytest.raises(BadImage) as caught:
        Picture(data).decode(1)
    return caught.value.fault


def with_pillow(data):
    with Image.open(BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2}, {"quality": 30}]
)
def test_a_jpeg_decodes_as_pillow_decodes_it(scene, options):
    data = encode(scene, **options)
    assert difference(decode(data), with_pillow(data)) < 0.5


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_reduced_picture_is_the_whole_one_averaged(scene, reduction, kind):
    picture = Picture(encode(scene, kind))
    assert (picture.height, picture.width) == (H, W)
    height, width = H // reduction, W // reduction
    whole = scene[: height * reduction, : width * reduction]
    reference = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    pixels = picture.decode(reduction)
    assert pixels.shape == (-(-H // reduction), -(-W // reduction), 3)
    assert difference(pixels[:height, :width], reference) < (0.5 if kind == "PNG" else 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_exif_orientation_is_turned_upright(scene, orientation, kind):
    exif = Image.Exif()
    exif[0x010F] = "A maker, before the orientation"
    exif[0x0112] = orientation
    data = encode(scene, kind, exif=exif)
    picture = Picture(data)
    upright = with_pillow(data)
    assert (picture.height, picture.width) == upright.shape[:2] == ((H, W) if orientation < 5 else (W, H))
    assert difference(picture.decode(1), upright) < 0.5
    half = picture.decode(2)
    assert half.shape[:2] == (-(-picture.height // 2), -(-picture.width // 2))
    assert difference(cv2.resize(half, upright.shape[1::-1]), upright) < 12
    assert half.flags.c_contiguous


def test_exif_is_read_in_both_byte_orders_and_ignored_if_broken(scene):
    jpeg = encode(scene)
    turned = [
        mark + struct.pack(order + "IHHHIHH", 8, 1, 0x0112, 3, 1, 3, 0)
        for order, mark in (("<", b"II*\0"), (">", b"MM\0*"))
    ]
    broken = [b"", b"II*\0", b"nonsense", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"]
    for tiff in (*turned, *broken):
        segment = b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff
        expected = decode(jpeg)[::-1, ::-1] if tiff in turned else decode(jpeg)
        assert difference(decode(jpeg[:2] + segment + jpeg[2:]), expected) == 0


def test_lossless_formats_and_grey_give_every_pixel_back(scene):
    for kind in ("PNG", "BMP", "TIFF", "PPM", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert difference(decode(encode(scene, kind, **options)), scene) == 0
    grey = scene[..., 0]
    for kind, tolerance in (("JPEG", 3), ("PNG", 0), ("TIFF", 0)):
        assert difference(decode(encode(grey, kind)), np.stack([grey] * 3, axis=-1)) <= tolerance


def test_cmyk_and_ycck_jpegs_look_like_their_picture(scene):
    data = encode(Image.fromarray(scene).convert("CMYK"), quality=95)
    assert simplejpeg.decode_jpeg_header(data)[2] == "CMYK"
    assert difference(decode(data), scene) < 6
    # The Adobe segment's last byte says YCCK (2) instead of CMYK (0): the channels mean something else, in Pillow too.
    ycck = bytearray(data)
    ycck[data.index(b"Adobe") + 11] = 2
    assert difference(decode(bytes(ycck)), with_pillow(bytes(ycck))) == 0


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
    expected = np.stack([np.rint(ramp / 257)] * 3, axis=-1)
    for kind in ("PNG", "TIFF"):
        assert difference(decode(encode(Image.fromarray(ramp), kind)), expected) < 0.01
    pgm = b"P5 %d %d 65535\n" % (W, H) + ramp.astype(">u2").tobytes()
    assert difference(decode(pgm), expected) < 0.01


def test_palettes_and_bilevel(scene):
    palette = Image.fromarray(scene).quantize(64)
    for kind in ("PNG", "GIF", "BMP"):
        assert difference(decode(encode(palette, kind)), palette.convert("RGB")) == 0
    bilevel = Image.fromarray(scene).convert("1")
    assert set(np.unique(decode(encode(bilevel, "PNG")))) == {0, 255}


def test_transparency_becomes_white(scene):
    alpha = np.zeros((H, W, 1), np.uint8)
    alpha[:, W // 2 :] = 255
    alpha[0] = 51
    data = encode(Image.fromarray(np.concatenate([scene, alpha], axis=-1)), "PNG")
    share = alpha / 255
    assert difference(decode(data), np.rint(scene * share + 255 * (1 - share))) < 0.5
    palette = Image.fromarray(scene).quantize(16)
    index = palette.getpixel((3, 3))
    shown = decode(encode(palette, "GIF", transparency=index))
    hidden = np.asarray(palette) == index
    assert (shown[hidden] == 255).all()
    assert np.array_equal(shown[~hidden], np.asarray(palette.convert("RGB"))[~hidden])
    grey_alpha = Image.merge("LA", (Image.new("L", (W, H), 0), Image.new("L", (W, H), 0)))
    assert decode(encode(grey_alpha, "PNG")).min() == 255


def test_the_first_frame_of_several_counts():
    frames = [Image.new("RGB", (W, H), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        picture = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert difference(picture, np.full((H, W, 3), (255, 0, 0))) < 1


def test_jpegs_with_odd_but_harmless_bytes_decode(scene):
    jpeg = encode(scene)
    padded = jpeg[:2] + b"\xff\xff" + jpeg[2:]  # fill bytes before a marker
    trailing = jpeg + b"left over" * 100
    stray = jpeg[:-2] + b"\0\0\0\0" + jpeg[-2:]  # libjpeg warns of extraneous bytes
    for data in (padded, trailing, stray):
        assert difference(decode(data), decode(jpeg)) == 0


def test_truncated_images_are_refused(scene):
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        data = encode(scene, kind)
        for share in (0.02, 0.3, 0.7, 0.97):
            with pytest.raises(BadImage):
                decode(data[: int(len(data) * share)])


def test_reasons_are_told_apart(scene, monkeypatch):
    jpeg = encode(scene)
    for data, fault in (
        (b"", Fault.EMPTY),
        (b"<html>404 Not Found</html>", Fault.NOT_AN_IMAGE),
        (jpeg[: len(jpeg) // 2], Fault.TRUNCATED),
    ):
        assert fault_of(data) == fault
        error = pickle.loads(pickle.dumps(BadImage(fault)))
        assert (error.fault, str(error)) == (fault, fault.reason)
    # A JPEG with two headers that disagree.
    other = encode(scene[:20])
    frame = jpeg.index(b"\xff\xc0")
    assert fault_of(jpeg[: frame + 19] + other[other.index(b"\xff\xc0") :]) in (Fault.CORRUPT, Fault.TRUNCATED)
    monkeypatch.setattr("data.decode.MAX_BYTES", len(jpeg) - 1)
    assert fault_of(jpeg) == Fault.TOO_MANY_BYTES


def bomb(kind):
    if kind == "JPEG":
        data = bytearray(encode(np.zeros((16, 16, 3), np.uint8)))
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
        return bytes(data)
    header = struct.pack(">IIBBBBB", 30_000, 4_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(4_000 * 3_751))), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decompression_bombs_are_refused_by_their_header(kind):
    data = bomb(kind)
    assert len(data) < 20_000
    assert fault_of(data) == Fault.TOO_LARGE


NOISE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]), data=st.data())
def test_damaged_bytes_give_a_picture_or_a_reason(kind, data):
    stream = BytesIO()
    Image.fromarray(NOISE).save(stream, kind)
    damaged = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 12))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    reduction = data.draw(st.sampled_from([1, 2, 4, 8]))
    try:
        picture = Picture(bytes(damaged))
        pixels = picture.decode(reduction)
    except BadImage:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape == (-(-picture.height // reduction), -(-picture.width // reduction), 3)


def test_a_format_beyond_the_list_is_no_image(scene):
    for kind in ("TGA", "PCX", "ICO", "SGI", "IM", "DDS", "JPEG2000", "MSP", "XBM", "PDF", "EPS", "ICNS"):
        picture = Image.fromarray(scene[:32, :32]).convert("1" if kind in ("MSP", "XBM") else "RGB")
        assert fault_of(encode(picture, kind)) == Fault.NOT_AN_IMAGE, kind


def test_a_jpeg_that_hides_a_larger_one_from_our_reading_is_refused():
    """A marker without a length: what we would skip as its content, libjpeg reads."""
    small = encode(make_photo(64, 64))
    header = read_header(small)
    frame = small[header.frame : header.frame + 19]
    large = frame[:5] + (65500).to_bytes(2, "big") * 2 + frame[9:]
    hidden = small[2 : header.frame] + large + small[header.frame + 19 :]
    for marker in (b"\xff\x01", b"\xff\xd0", b"\xff\xd7"):
        crafted = b"\xff\xd8" + marker + (2 + len(hidden)).to_bytes(2, "big") + hidden + small[2:]
        assert read_header(crafted) is None
        assert fault_of(crafted) in (Fault.TOO_LARGE, Fault.NOT_AN_IMAGE)


def test_a_jpeg_with_a_thousand_passes_over_a_large_picture_is_refused_at_once():
    for mode in ("L", "CMYK"):  # libjpeg-turbo's path and Pillow's
        whole = encode(Image.new(mode, (2200, 2200)), progressive=True)
        scan = whole[whole.rindex(b"\xff\xda") : -2]
        began = time.monotonic()
        assert fault_of(whole[:-2] + 1000 * scan + whole[-2:]) == Fault.CORRUPT
        assert time.monotonic() - began < 2  # to decode it takes more than ten seconds
    small = encode(Image.new("L", (90, 90)), progressive=True)
    scan = small[small.rindex(b"\xff\xda") : -2]
    assert decode(small[:-2] + 20 * scan + small[-2:]).shape == (90, 90, 3)


TALL, WIDE = 200, 150
KINDS = {
    "plain": {},
    "rows end in restart markers": {"restart_marker_rows": 1},
    "optimised, with restart markers": {"restart_marker_rows": 1, "optimize": True},
    "full colour resolution": {"subsampling": 0, "restart_marker_rows": 1},
    "half colour resolution": {"subsampling": 1, "restart_marker_rows": 1},
    "several restart markers in a row": {"restart_marker_blocks": 2, "optimize": True},
    "restarts that are not rows": {"restart_marker_blocks": 3},
    "progressive": {"progressive": True},
}


@pytest.fixture(params=[*KINDS, "grey"])
def jpeg(request):
    pixels, options = make_photo(TALL, WIDE, 3), KINDS.get(request.param, {"restart_marker_rows": 1})
    return encode(pixels[..., 0] if request.param == "grey" else pixels, **options)


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_box_has_the_pixels_of_the_whole_picture(jpeg, reduction):
    whole = Picture(jpeg).decode(reduction, smooth_colours=False)
    height, width = whole.shape[:2]
    for top, bottom in ((0, 1), (0, 1000), (3, 17), (16, 32), (40, 90), (95, 96), (150, 200), (199, 200)):
        for left, right in ((0, 1), (0, 1000), (15, 17), (48, 96), (60, 61), (97, 143), (149, 150)):
            top, left = min(top // reduction, height - 1), min(left // reduction, width - 1)
            bottom, right = min(-(-bottom // reduction), height), min(-(-right // reduction), width)
            box = Box(top, left, max(bottom - top, 1), max(right - left, 1))
            assert np.array_equal(Picture(jpeg).decode_box(reduction, box), whole[box.slices])


@settings(max_examples=60)
@given(blocks=st.sampled_from([1, 2, 4, 8, 16]), sampling=st.sampled_from([0, 1, 2]), data=st.data())
def test_any_box_of_a_jpeg_with_any_restart_markers(blocks, sampling, data):
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 140))
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(stream := BytesIO(), "JPEG", subsampling=sampling, restart_marker_blocks=blocks)
    jpeg = stream.getvalue()
    reduction = data.draw(st.sampled_from([1, 2, 4, 8]))
    whole = Picture(jpeg).decode(reduction, smooth_colours=False)
    top, left = data.draw(st.integers(0, whole.shape[0] - 1)), data.draw(st.integers(0, whole.shape[1] - 1))
    tall, wide = data.draw(st.integers(1, whole.shape[0] - top)), data.draw(st.integers(1, whole.shape[1] - left))
    box = Box(top, left, tall, wide)
    for one in (jpeg, indexed := with_index(jpeg)):
        assert np.array_equal(Picture(one).decode_box(reduction, box), whole[box.slices])
    assert np.array_equal(decode(indexed), decode(jpeg))
    wrong = bytearray(indexed)  # an index that does not fit costs time only, or is noticed
    wrong[data.draw(st.integers(4, len(indexed) - len(jpeg) + 4))] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(BadImage):
        assert Picture(bytes(wrong)).decode_box(reduction, box).shape == (tall, wide, 3)


def test_bytes_behind_the_end_and_lost_markers_do_no_harm():
    data, box = encode(make_photo(TALL, WIDE, 3), restart_marker_rows=1), Box(100, 20, 100, 120)
    whole = Picture(data).decode(1, smooth_colours=False)
    assert np.array_equal(Picture(data + b"trailing \xff\xd3 bytes").decode_box(1, box), whole[box.slices])
    lost = data.replace(b"\xff\xd2", b"\x00\x00", 1)
    with suppress(BadImage):
        assert Picture(lost).decode_box(1, box).shape == (100, 120, 3)
