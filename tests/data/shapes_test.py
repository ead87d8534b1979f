import colorsys
import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from clipa_t5x.data import shapes, wordpiece

NUM_SCENES = 4000


@pytest.fixture(scope="module")
def captioned_scenes():
    """Scenes and captions by split, as the records hold them but not rendered."""
    result = {}
    for split in shapes.SPLITS:
        result[split] = []
        for index in range(NUM_SCENES):
            rng = np.random.default_rng([0, index])
            scene = shapes.sample_scene(rng, split)
            result[split].append((scene, shapes.caption(scene, rng)))
    return result


def test_a_quarter_of_the_combinations_is_held_out():
    held_out, train = shapes.held_out_combinations(), shapes.train_combinations()
    assert (len(held_out), len(train)) == (24, 72)
    assert len({*held_out, *train}) == 96
    for color in shapes.COLORS:
        assert sum(c.color == color for c in held_out) == 3


def test_every_pair_of_attributes_is_left_to_training():
    for i, j, values_i, values_j in (
        (0, 1, shapes.COLORS, shapes.SHAPES),
        (0, 2, shapes.COLORS, shapes.PATTERNS),
        (1, 2, shapes.SHAPES, shapes.PATTERNS),
    ):
        pairs = {(c[i], c[j]) for c in shapes.train_combinations()}
        assert pairs == set(itertools.product(values_i, values_j))


def test_training_never_shows_a_held_out_combination(captioned_scenes):
    held_out = set(shapes.held_out_combinations())
    seen = {spec.combination for scene, _ in captioned_scenes["train"] for spec in scene.objects}
    assert not seen & held_out
    assert seen == set(shapes.train_combinations())


def test_evaluation_always_shows_a_held_out_combination(captioned_scenes):
    held_out = set(shapes.held_out_combinations())
    for split in ("validation", "zeroshot"):
        for scene, _ in captioned_scenes[split]:
            assert any(spec.combination in held_out for spec in scene.objects)
    for scene, _ in captioned_scenes["zeroshot"]:
        assert [spec.count for spec in scene.objects] == [1]


def test_kinds_of_scene(captioned_scenes):
    for split in ("train", "validation"):
        scenes = [scene for scene, _ in captioned_scenes[split]]
        single = np.mean([len(s.objects) == 1 and s.objects[0].count == 1 for s in scenes])
        assert 0.77 < single < 0.83
        for scene in scenes:
            assert (len(scene.objects) == 2) == (scene.relation is not None)
            assert len({spec.combination for spec in scene.objects}) == len(scene.objects)


def test_captions_have_5_to_20_words(captioned_scenes):
    lengths = [len(text.split()) for pairs in captioned_scenes.values() for _, text in pairs]
    assert 5 <= min(lengths) < 8
    assert 17 < max(lengths) <= 20


def mentions(text):
    """(color, shape, pattern) as the caption tells them, in order; None where it is silent."""
    color, shape = "|".join(shapes.COLORS), "|".join(shapes.SHAPES)
    pattern = "|".join(shapes.PATTERNS)
    after = {"stripes": "striped", "dots": "dotted"}
    found = []
    for match in re.finditer(
        rf"\b({pattern})? ?\b({color}) ({shape})(?:e?s)?\b(?: with (\w+))?", text
    ):
        found.append((match[2], match[3], match[1] or after.get(match[4])))
    if not found:
        words = wordpiece.basic_tokenize(text)
        found = [
            tuple(
                next((word for word in words if word in names), None)
                for names in (shapes.COLORS, shapes.SHAPES, shapes.PATTERNS)
            )
        ]
    return found


def names_shape_alone(scene, said):
    (color, shape, pattern), *others = said
    lone = not others and scene.objects[0].count == 1
    return lone and shape is not None and color is None and pattern is None


def test_some_captions_of_lone_objects_name_the_shape_alone(captioned_scenes):
    lone = [(s, t) for s, t in captioned_scenes["train"] if [o.count for o in s.objects] == [1]]
    terse = [text for scene, text in lone if names_shape_alone(scene, mentions(text))]
    assert 1 / 12 < len(terse) / len(lone) < 1 / 6


def test_captions_agree_with_their_scenes(captioned_scenes):
    for scene, text in itertools.chain(*captioned_scenes.values()):
        said = mentions(text)
        assert len(said) == len(scene.objects), text
        for (color, shape, pattern), spec in zip(said, scene.objects, strict=True):
            if names_shape_alone(scene, said):
                assert shape == spec.combination.shape
                continue
            assert (color, shape) == (spec.combination.color, spec.combination.shape), text
            silent_about_solid = pattern is None and spec.combination.pattern == "solid"
            assert silent_about_solid or pattern == spec.combination.pattern, text
        words = text.split()
        for word in ("small", "large"):
            assert words.count(word) <= sum(spec.size == word for spec in scene.objects)
        numbers = {1: "one", 2: "two", 3: "three", 4: "four"}
        counts = {numbers[spec.count] for spec in scene.objects} | {"one"}
        assert {word for word in words if word in numbers.values()} <= counts
        for spec in scene.objects:
            assert spec.count == 1 or numbers[spec.count] in words


def test_captions_agree_with_background_and_relation(captioned_scenes):
    background_words = {
        "dark": "dark",
        "light": "light",
        "sandy": "sandy|sand",
        "grassy": "grassy|grass",
        "wooden": "wooden",
        "cloudy": "cloudy",
    }
    relation_words = {
        "above": "above|over",
        "below": "below|under",
        "left": "left",
        "right": "right",
    }
    said_background = said_relation = 0
    for scene, text in itertools.chain(*captioned_scenes.values()):
        for words, truth in (
            (background_words, scene.background),
            (relation_words, scene.relation),
        ):
            named = {name for name, regex in words.items() if re.search(rf"\b({regex})\b", text)}
            assert named <= {truth}, text
            said_background += bool(named) and words is background_words
            said_relation += bool(named) and words is relation_words
    assert said_background > NUM_SCENES
    assert said_relation > NUM_SCENES / 10


def test_first_seven_tokens_describe_the_first_object(captioned_scenes):
    for scene, text in itertools.chain(*captioned_scenes.values()):
        start = " ".join(wordpiece.basic_tokenize(text)[:7])
        if names_shape_alone(scene, mentions(text)):
            continue
        color, shape, pattern = scene.objects[0].combination
        stem = {"striped": "stripe", "dotted": "dot", "solid": ""}[pattern]
        assert color in start, text
        assert shape in start, text
        assert stem in start, text


def test_solid_is_sometimes_left_unsaid(captioned_scenes):
    said = [
        "solid" in text
        for scene, text in captioned_scenes["train"]
        if len(scene.objects) == 1 and scene.objects[0].combination.pattern == "solid"
    ]
    assert 0.6 < np.mean(said) < 0.8


def test_articles_fit(captioned_scenes):
    for _, text in itertools.chain(*captioned_scenes.values()):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |^ | $", text), text


def test_vocabulary_knows_every_word(captioned_scenes):
    known = set(wordpiece.build_vocabulary(shapes.phrases()))
    for _, text in itertools.chain(*captioned_scenes.values()):
        assert known.issuperset(wordpiece.basic_tokenize(text)), text
    lists = itertools.chain(shapes.class_lists().values(), shapes.template_lists().values())
    for text in itertools.chain(*lists):
        assert known.issuperset(wordpiece.basic_tokenize(text.replace("{}", ""))), text


def test_prompts_fit_seven_tokens_and_resemble_captions(captioned_scenes):
    captions = [f"{text} " for _, text in captioned_scenes["train"]]
    lists, templates = shapes.class_lists(), shapes.template_lists()
    for classes, names in (("combination", "shapes"), ("shape", "shape"), ("color", "color")):
        for template, name in itertools.product(templates[names], lists[classes]):
            assert len(wordpiece.basic_tokenize(template.format(name))) <= 7
    for template in templates["color"]:
        start = template.format("red")
        assert any(text.startswith(start) for text in captions), template
    for template in templates["shapes"]:
        start = template.format("striped red")
        assert any(text.startswith(start) for text in captions), template


def hue_of_object(image):
    hsv = np.array([colorsys.rgb_to_hsv(*p) for p in image.reshape(-1, 3) / 255.0])
    vivid = hsv[hsv[:, 1] > 0.3]
    turns = np.exp(2j * np.pi * vivid[:, 0]).mean()
    return np.degrees(np.angle(turns)) % 360


def test_rendered_colours_can_be_told_apart():
    hues = {}
    for color in shapes.COLORS:
        spec = shapes.ObjectSpec(shapes.Combination(color, "circle", "solid"), "large")
        scene = shapes.Scene("light", (spec,))
        hues[color] = [
            hue_of_object(shapes.render(scene, np.random.default_rng(i), 24)) for i in range(4)
        ]
    # The widest spread within a name is narrower than the smallest step between two.
    middles = {color: np.angle(np.exp(1j * np.radians(h)).mean()) for color, h in hues.items()}
    for color, values in hues.items():
        for hue in values:
            distance = {
                c: abs(np.angle(np.exp(1j * (np.radians(hue) - m)))) for c, m in middles.items()
            }
            assert min(distance, key=distance.get) == color


def test_relation_is_where_the_objects_are():
    red = shapes.ObjectSpec(shapes.Combination("red", "square", "solid"), "medium", 2)
    blue = shapes.ObjectSpec(shapes.Combination("blue", "circle", "solid"), "large")
    offsets = {"above": (0, -1), "below": (0, 1), "left": (-1, 0), "right": (1, 0)}
    for relation, (dx, dy) in offsets.items():
        scene = shapes.Scene("dark", (red, blue), relation)
        image = shapes.render(scene, np.random.default_rng(0), 48).astype(int)
        reds = np.argwhere(image[:, :, 0] > image[:, :, 2] + 60).mean(axis=0)
        blues = np.argwhere(image[:, :, 2] > image[:, :, 0] + 60).mean(axis=0)
        y, x = reds - blues
        assert dx * x + dy * y > 12, relation


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_count_is_how_many_there_are(count):
    from scipy import ndimage

    spec = shapes.ObjectSpec(shapes.Combination("red", "circle", "solid"), "medium", count)
    scene = shapes.Scene("light", (spec,))
    for seed in range(5):
        image = shapes.render(scene, np.random.default_rng(seed), 64).astype(int)
        _, found = ndimage.label(image[:, :, 0] > image[:, :, 2] + 90)
        assert found == count


def test_large_is_larger():
    def area(size):
        spec = shapes.ObjectSpec(shapes.Combination("red", "square", "solid"), size)
        image = shapes.render(shapes.Scene("light", (spec,)), np.random.default_rng(0), 64).astype(
            int
        )
        return (image[:, :, 0] > image[:, :, 2] + 90).sum()

    assert 1.3 * area("small") < area("medium") < area("large") / 1.3


def test_zeroshot_labels_are_the_classes():
    classes = shapes.class_lists()
    counts = np.zeros(24, int)
    for index in range(48):
        record = shapes.example("zeroshot", index, image_size=16)
        combination = shapes.held_out_combinations()[record["combination"]]
        counts[record["combination"]] += 1
        assert classes["combination"][record["combination"]] == combination.name
        assert classes["shape"][record["shape"]] == combination.shape
        assert classes["color"][record["color"]] == combination.color
        assert combination.shape in record["txt"]
    assert (counts == 2).all()


def test_captions_do_not_depend_on_the_image_size():
    for index in range(10):
        small, large = (shapes.example("train", index, image_size=s) for s in (16, 48))
        assert small["txt"] == large["txt"]
        assert (small["width"], large["height"]) == (16, 48)
        assert Image.open(io.BytesIO(large["jpg"])).size == (48, 48)


def test_seed_and_split_and_index_make_the_record():
    base = shapes.example("train", 3, image_size=16)
    assert base == shapes.example("train", 3, image_size=16)
    for other in (
        shapes.example("train", 4, image_size=16),
        shapes.example("train", 3, image_size=16, seed=1),
        shapes.example("validation", 3, image_size=16),
    ):
        assert other["jpg"] != base["jpg"]


def test_workers_do_not_change_the_records():
    alone = list(shapes.examples("train", 70, image_size=16, num_workers=0))
    together = list(shapes.examples("train", 70, image_size=16, num_workers=2))
    assert alone == together
    assert [record["key"] for record in alone] == [f"{i:08d}" for i in range(70)]
