import experiments
import pytest

from clipa_t5x import gin_utils, plan, published, recipe_changes

BY_STAGES = {(p.model, p.data, p.recipe): p for p in published.POINTS}


def test_compute_is_what_the_figures_are_drawn_at():
    """Within 4 %: recipes were read from the text, compute off the drawing."""
    drawn = [point for point in published.POINTS if point.listed_compute]
    assert len(drawn) == 18
    for point in drawn:
        # Multiply-adds of forward passes against FLOPs of whole steps.
        assert point.training_flops / 6e20 == pytest.approx(point.listed_compute, rel=0.04), point


def test_stages_add_up():
    recipe = "12.8B@84 + 512M@224 + 128M@336"
    point = BY_STAGES["bigG/14", "DataComp-1B", recipe]
    parts = [published.stage_flops("bigG/14", stage) for stage in point.stages]
    assert point.training_flops == sum(parts)
    # The chief share is of the many samples with few tokens.
    assert parts[0] / point.training_flops == pytest.approx(0.79, abs=0.01)


def test_points_are_distinct_and_their_sources_are_named():
    assert len({(p.model, p.data, p.recipe, p.source) for p in published.POINTS}) == len(
        published.POINTS
    )
    for point in published.POINTS:
        assert point.model in published.MODELS and point.source in published.SOURCES
        assert 50 < point.accuracy < 84


@pytest.mark.parametrize("name", published.MODELS)
def test_models_are_found_again_by_their_sizes(name):
    assert published.name_of(published.clip_model(name, 0.3)) == name


def test_models_of_other_sizes_have_no_published_name():
    other = published.clip_model("L/14")
    assert published.name_of(other.clone(text_tower=other.image_tower)) is None
    assert published.name_of(other.clone(text_tower=None)) is None


SCHEDULES = sorted({p.schedule for p in published.POINTS if p.schedule})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gins_recipes_take_the_compute_of_the_published_runs(schedule):
    search_paths = [str(experiments.GIN), str(experiments.REPOSITORY)]
    stages = plan.read_recipe([f"{schedule}.gin"], [], search_paths)
    for point in published.POINTS:
        if point.schedule == schedule:
            done = stages[: len(point.stages)]
            assert [stage.training_flops for stage in done] == pytest.approx(
                [published.stage_flops(point.model, stage) for stage in point.stages], rel=1e-4
            )
            assert {published.name_of(stage.model) for stage in stages} == {point.model}


def test_models_have_the_published_number_of_parameters():
    """As `recipes_test` has of the recipes."""
    counts = {name: published.num_params(name) for name in ("S/16", "H/14", "bigG/14")}
    assert counts == {"S/16": 55_479_169, "H/14": 967_906_049, "bigG/14": 2_516_796_289}


def test_models_are_found_again_in_configurations():
    experiments.parse("B16_stage2", "MODEL_DIR = 'unused'", "INITIAL_CHECKPOINT_PATH = None")
    gin_utils.build_arguments(experiments.TRAIN)
    sizes = recipe_changes.parameters(gin_utils.operative_config())
    assert published.name_by_sizes(sizes) == "B/16"
    sizes["text_transformer.TextTransformer.depth"] = 13
    assert published.name_by_sizes(sizes) is None
    assert published.name_by_sizes({}) is None
