from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from rectokens.schemas.search import NORMALIZATIONS
from server.settings import SettingsError, load_settings, setting_fields, value_of
from server.settings_doc import settings_markdown
from server.settings_serving import NormalizationName

pytestmark = pytest.mark.usefixtures("no_settings")
DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def test_defaults_are_valid_and_local():
    settings = load_settings()
    assert settings.host == "127.0.0.1"
    assert settings.http.cors_origins == ()


def test_a_flag_wins_over_the_environment_and_leaves_its_neighbours(monkeypatch):
    monkeypatch.setenv("RECTOKENS_LIMITS__MAX_TOP_K", "20")
    monkeypatch.setenv("RECTOKENS_LIMITS__MAX_EXCLUDE_ITEMS", "7")
    settings = load_settings({"limits.max_top_k": "30", "port": None})
    assert settings.limits.max_top_k == 30
    assert settings.limits.max_exclude_items == 7
    assert settings.port == 8000


@pytest.mark.parametrize("field", list(setting_fields()), ids=lambda field: field.path)
def test_every_setting_is_an_environment_variable(monkeypatch, field):
    if field.info.annotation is bool:
        value = str(not field.default)
    elif choices := [v for v in get_args(field.info.annotation) if isinstance(v, str)]:
        value = choices[-1]
    elif isinstance(field.default, (int, float)):
        value = str(field.default)
    else:
        value = {"admin.sources": "name=3", "admin.keys": "k" * 16}.get(field.path, "3")
        if field.group == "gate":
            value = "0.5"
    if field.path == "access.requests_per_minute":  # means nothing alone
        monkeypatch.setenv("RECTOKENS_ACCESS__KEYS_FILE", "keys")
    monkeypatch.setenv(field.env, value)
    found = value_of(load_settings(), field.path)
    if field.path == "proxy.upstream_key":
        assert value not in repr(found)
        found = found.get_secret_value()
    if field.path == "admin.keys":
        assert "k" not in repr(found).replace("SecretStr", "")
        found = tuple(key.get_secret_value() for key in found)
    assert str(found) in (value, f"('{value}',)", f"({value},)")


def test_captured_shapes_are_numbers_between_commas(monkeypatch):
    monkeypatch.setenv("RECTOKENS_ENGINE__CAPTURED_REQUESTS", "1, 3,24")
    assert load_settings().engine.captured_requests == (1, 3, 24)
    for wrong in ("3,1", "0,1", "2,2", "1,9000"):
        monkeypatch.setenv("RECTOKENS_ENGINE__CAPTURED_REQUESTS", wrong)
        with pytest.raises(SettingsError, match="distinct, ascending, and from 1 to 8192"):
            load_settings()


@pytest.mark.parametrize("field", list(setting_fields()), ids=lambda field: field.path)
def test_every_setting_has_help_and_a_unit_where_it_needs_one(field):
    assert field.help.endswith(".")
    name = field.path.rpartition(".")[2]
    for words, unit in (("in milliseconds", "_ms"), ("in seconds", "_s"), ("in bytes", "_bytes")):
        assert (words in field.help) == name.endswith(unit), field.path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("RECTOKENS_PROT", "RECTOKENS_PORT"),
        ("RECTOKENS_LIMITS_MAX_TOP_K", "RECTOKENS_LIMITS__MAX_TOP_K"),
        ("RECTOKENS_LIMITS", "RECTOKENS_LIMITS__MAX_TOP_K"),
        ("RECTOKENS_ZZZZZZZ", "serve --help"),
        ("rectokens_hots", "RECTOKENS_HOST"),
    ],
)
def test_an_unknown_variable_is_refused_with_near_misses(monkeypatch, name, hint):
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert name in str(error.value)
    assert hint in str(error.value)


def test_the_data_folder_is_no_setting_but_allowed(monkeypatch):
    monkeypatch.setenv("RECTOKENS_DATA_DIR", "/data")
    load_settings()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"port": "80a"}, ["RECTOKENS_PORT", "--port", "'80a'"]),
        ({"port": "70000"}, ["RECTOKENS_PORT", "65535"]),
        ({"dtype": "fp8"}, ["--dtype", "'fp8'", "bfloat16"]),
        ({"drain_timeout_s": "nan"}, ["--drain-timeout-s", "nan"]),
        ({"limits.max_body_bytes": "3"}, ["RECTOKENS_LIMITS__MAX_BODY_BYTES", "1024"]),
        ({"defaults.top_k": "80"}, ["RECTOKENS_DEFAULTS__TOP_K is 80", "BEAM_WIDTH, 50"]),
        ({"limits.max_top_k": "9999"}, ["RECTOKENS_LIMITS__MAX_TOP_K is 9999", "5000"]),
        ({"limits.max_timeout_ms": "10"}, ["DEFAULTS__TIMEOUT_MS is 10000"]),
        ({"batching.max_queued_beam_rows": "10"}, ["LIMITS__MAX_BEAM_WIDTH is 5000", "10"]),
    ],
)
def test_a_bad_value_names_setting_value_and_limit(flags, parts):
    with pytest.raises(SettingsError) as error:
        load_settings(flags)
    for part in parts:
        assert part in str(error.value)


def test_all_bad_values_are_told_at_once():
    with pytest.raises(SettingsError) as error:
        load_settings({"port": "x", "limits.max_top_k": "y"})
    assert "RECTOKENS_PORT" in str(error.value)
    assert "RECTOKENS_LIMITS__MAX_TOP_K" in str(error.value)


def test_origins_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("RECTOKENS_HTTP__CORS_ORIGINS", "https://a.example, https://b.example")
    assert load_settings().http.cors_origins == ("https://a.example", "https://b.example")


def test_source_folders(monkeypatch):
    monkeypatch.setenv("RECTOKENS_ADMIN__SOURCES", "lake=/data/lake, b-2=/x=y")
    folders = load_settings().admin.source_folders
    assert folders == {"lake": Path("/data/lake"), "b-2": Path("/x=y")}
    for bad in ("lake", "=x", "a=", "../a=b", "a=b,a=c", "uploads=b"):
        monkeypatch.setenv("RECTOKENS_ADMIN__SOURCES", bad)
        with pytest.raises(SettingsError, match=r"name=folder|is taken"):
            load_settings()


def test_the_normalizations_are_the_library_s():
    assert get_args(NormalizationName) == NORMALIZATIONS


def test_the_page_on_settings_is_up_to_date():
    assert DOCS.read_text() == settings_markdown(), (
        "run: python -m server settings-doc > docs/settings.md"
    )


def test_every_setting_is_on_the_page():
    page = settings_markdown()
    for field in setting_fields():
        assert f"`{field.env}`" in page
        assert f"`{field.flag}`" in page
        assert field.help in page


@pytest.mark.parametrize("keys", ["short", "with a blank in it", "k" * 16 + ",short", "ä" * 16])
def test_a_bad_admin_key_is_refused_and_not_shown(keys):
    with pytest.raises(SettingsError, match="at least 16") as error:
        load_settings({"admin.keys": keys})
    assert keys not in str(error.value)
    assert "short" not in str(error.value)


def test_a_key_is_never_repeated(monkeypatch):
    with pytest.raises(SettingsError, match=r"UPSTREAM_KEY.* is not accepted") as error:
        load_settings({"proxy.upstream_key": "a secret"})
    assert "secret" not in str(error.value)
    both = {"proxy.upstream_key": "secret", "proxy.forward_authorization": True}
    with pytest.raises(SettingsError, match="the upstream gets one key") as error:
        load_settings(both)
    assert "secret" not in str(error.value)
