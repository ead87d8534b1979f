import io
import subprocess
import sys

import pytest
import tiny_tars
from PIL import Image

from clipa_t5x.data import image_files, shard_conversion
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.errors import UserError


def shrink(data, short_side, quality=95):
    return shard_conversion.shrink(image_files.check(data), short_side, quality)


@pytest.mark.parametrize(
    "height, width, expected",
    [(100, 160, (64, 102)), (160, 100, (102, 64)), (65, 65, (64, 64)), (129, 641, (64, 318))],
)
@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB")])
def test_the_short_side_is_what_was_asked_for(height, width, expected, kind, mode):
    found = shrink(tiny_tars.image(0, height, width, kind, mode), 64)
    image = Image.open(io.BytesIO(found.data))
    assert (found.height, found.width) == (image.height, image.width) == expected
    assert (image.format, image.mode) == ("JPEG", mode)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("short_side", [None, 40, 41, 500])
def test_what_is_no_larger_stays_byte_for_byte(kind, short_side):
    data = tiny_tars.image(0, 40, 90, kind)
    assert shrink(data, short_side).data == data


def test_quality_tells():
    data = tiny_tars.image(0, 300, 300)
    assert len(shrink(data, 100, 40).data) < len(shrink(data, 100, 95).data)


def test_what_had_to_be_mended_becomes_a_jpeg():
    found = shrink(tiny_tars.image(0, kind="PNG", mode="RGBA"), None)
    assert found.data.startswith(image_files.JPEG_START)
    assert (found.height, found.width, found.mended) == (40, 56, "alpha")


def test_broken_pixels_are_told():
    # The header and the end are in order, what is between them is not.
    data = tiny_tars.image(0, 400, 400, "PNG")
    with pytest.raises(BadRecord) as error:
        shrink(data[:200] + data[-12:], 100)
    assert error.value.reason in ("unreadable image", "truncated image")


@pytest.mark.parametrize("label, expected", [([7], 7), ([b"7"], 7), ([-1], -1)])
def test_labels(label, expected):
    options = shard_conversion.Options(label_key="class")
    fields = {"jpg": [tiny_tars.image(0)], "txt": [b"x"], "class": label}
    features, changes = shard_conversion.convert(fields, 12, options)
    assert (features["label"], features["key"], changes) == (expected, b"000000012", [])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"class": [b"seven"]}, "label is no number"),
        ({"class": []}, "missing label"),
        ({"txt": [b" "]}, "empty caption"),
        ({"txt": []}, "missing caption"),
        ({"jpg": [3]}, "field of another type"),
    ],
)
def test_reasons(change, reason):
    options = shard_conversion.Options(label_key="class")
    fields = {"jpg": [tiny_tars.image(0)], "txt": [b"x"], "class": [1], **change}
    with pytest.raises(BadRecord) as error:
        shard_conversion.convert(fields, 0, options)
    assert error.value.reason == reason


def test_captions_are_made_fit_and_all_kept():
    options = shard_conversion.Options(caption_keys=("text", "other"))
    fields = {"jpg": [tiny_tars.image(0)], "text": [b"a", b"", b"b" * 9000], "key": [b"k"]}
    features, changes = shard_conversion.convert(fields, 0, options)
    assert features["txt"] == [b"a", b"b" * 4096] and "other" not in features
    assert (features["key"], changes) == (b"k", ["long caption"])


def test_images_may_go_without_captions():
    options = shard_conversion.Options(caption_keys=())
    features, _ = shard_conversion.convert({"jpg": [tiny_tars.image(0)]}, 0, options)
    assert set(features) == {"key", "jpg", "width", "height"}


@pytest.mark.parametrize(
    "keys", [("a", "txt"), ("txt", "json:jpg"), ("txt", "txt"), ("a", "json:b", "b")]
)
def test_fields_that_would_be_written_twice_are_refused(keys):
    with pytest.raises(UserError, match="twice"):
        shard_conversion.Options(caption_keys=keys)


def test_examples_are_bounded_by_reason():
    examples = [("a", f"a{i}") for i in range(50)] + [("b", "b0")]
    assert shard_conversion.bounded(examples) == [*(f"a{i}" for i in range(10)), "b0"]


def test_worker_processes_do_without_tensorflow():
    code = (
        "import sys; from clipa_t5x.data import build, conversion_workers, webdataset; "
        "print('tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
