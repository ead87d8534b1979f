from clipa_t5x.weights import differences


def test_nothing_differs():
    shapes = {"a": (2,), "b": ()}
    accepted = {"a": [(1, 2), (2,)], "b": [()]}
    assert differences.of_arrays(shapes, accepted, "arrays") == ""
    assert differences.of_models(shapes, accepted) == ""


def test_names_come_with_the_nearest_of_the_other_side_only():
    there = {"tower/norm/gamma": (3,), "same": (1,), "lonely": ()}
    here = {"tower/norm/scale": [(3,)], "same": [(1,)]}
    text = differences.of_arrays(there, here, "arrays")
    assert text == (
        "3 arrays differ: tower/norm/scale is missing there (nearest: tower/norm/gamma); "
        "tower/norm/gamma is unknown here (nearest: tower/norm/scale); lonely is unknown here"
    )


def test_shapes_are_told_of_both_sides_and_many_are_counted():
    there = {f"p{i}": (i,) for i in range(20)}
    here = {f"p{i}": [(i, 1), (i + 1,)] for i in range(20)}
    text = differences.of_arrays(there, here, "parameters")
    assert text.startswith("20 parameters differ: p0 is (0,) there and (0, 1) here; ")
    assert text.endswith("; ...") and text.count(" there and ") == 8


def test_options_come_first():
    there = {"img/head/kernel": (4, 8), "img/embedding/kernel": (2, 2, 3, 4)}
    here = {"img/head/kernel": [(4, 6)], "img/embedding/kernel": [(2, 2, 3, 4)]}
    text = differences.of_models(there, here)
    assert text.startswith(
        "is of a different model (VisionTransformer.out_dim is 8 there and 6 here): 1 parameters"
    )
    ours = {"image_tower/head/kernel": (4, 6)}
    assert "out_dim is 8 there and 6 here" in differences.of_models(there, here, ours)
