"""What a deployment on Ray may be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deploy.ray.config import ROUTER, Division, ServeConfig, Variant
from server.settings import SettingsError

ONE = {"name": "a", "settings": {"store.path": "/srv/store"}}
SCALED = {**ONE, "autoscaling": {"min_replicas": 1, "max_replicas": 4}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"variants": []}, "at least 1"),
        ({"variants": [ONE, ONE]}, "two variants are called 'a'"),
        ({"variants": [{**ONE, "weight": 0}]}, "above 0"),
        ({"variants": [{**ONE, "weight": -1}]}, "greater than or equal to 0"),
        ({"variants": [{**ONE, "name": "router"}]}, "the router has it"),
        ({"variants": [{**ONE, "name": "a/b"}]}, "match pattern"),
        ({"variants": [{**SCALED, "replicas": 2}]}, "give one"),
        ({"variants": [{**ONE, "autoscaling": {"min_replicas": 3, "max_replicas": 2}}]}, "at most"),
        ({"variants": [{**ONE, "gpus": 1}]}, "Extra inputs"),
        ({"variants": [ONE], "router": {"attempts": 0}}, "greater than or equal to 1"),
    ],
)
def test_mistakes_are_told(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServeConfig.model_validate(given)


@pytest.mark.parametrize("variant", [ONE, SCALED, {**ONE, "replicas": 3}])
def test_what_was_accepted_is_accepted_again(variant: dict[str, Any]) -> None:
    """It travels to replicas as a dictionary, with all its defaults."""
    config = ServeConfig.model_validate({"variants": [variant]})
    assert ServeConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": 1}, "weights are of a; the variants are a, b"),
        ({"a": 1, "b": 1, "c": 0}, "of a, b, c; the variants are a, b"),
        ({"a": 0, "b": 0}, "above 0"),
    ],
)
def test_a_division_names_every_variant(weights: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Division(weights=weights).check(["a", "b"])


def test_settings_are_those_of_the_service() -> None:
    settings = Variant.model_validate(
        {
            "name": "a",
            "settings": {
                "store.path": "/srv/store",
                "limits.max_top_k": 7,
                "defaults.top_k": 5,
                "engine.prefix_cache": False,
            },
        }
    ).load_settings()
    assert settings.store.path == "/srv/store"
    assert settings.limits.max_top_k == 7
    assert settings.engine.prefix_cache is False


def test_an_unknown_setting_is_refused() -> None:
    bad = Variant.model_validate({"name": "a", "settings": {"store.paht": "/srv/store"}})
    with pytest.raises(SettingsError, match="STORE__PAHT"):
        bad.load_settings()


@pytest.mark.parametrize(
    "settings", [{}, {"model": "m"}, {"release": "r", "store.path": "s"}], ids=str
)
def test_what_to_serve_is_said_once(settings: dict[str, str]) -> None:
    bad = Variant.model_validate({"name": "a", "settings": settings})
    with pytest.raises(ValueError, match=r"needs store\.path, or release"):
        bad.load_settings()


def test_the_example_is_accepted() -> None:
    example = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"
    (application,) = yaml.safe_load(example.read_text())["applications"]
    config = ServeConfig.model_validate(application["args"])
    names = [variant.name for variant in config.variants]
    (router,) = application["deployments"]
    assert router["name"] == ROUTER
    division = Division.model_validate(router["user_config"])
    division.check(names)
    assert division.weights == {"control": 90, "candidate": 10}
    for variant in config.variants:
        assert variant.load_settings().store.path
    module, _, name = application["import_path"].partition(":")
    source = Path(__file__).parents[2] / (module.replace(".", "/") + ".py")
    assert f"def {name}(" in source.read_text()
