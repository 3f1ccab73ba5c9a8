"""Configuration files: what is bound, and what a bad one is told."""

from __future__ import annotations

import logging

import gin
import pytest

from examples.utils import ConfigError, load_config, parse_config, run


@gin.configurable(module="tests.made")
def made(num_levels: int = 3, codebook_size: int = 256, output_dir: str = gin.REQUIRED) -> tuple:
    if codebook_size < 1:
        raise ValueError(f"codebook_size is {codebook_size}; it must be at least 1")
    return num_levels, codebook_size, output_dir


@pytest.fixture(autouse=True)
def _clean():
    yield
    gin.clear_config()


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "made.gin"
        path.write_text(text)
        return path

    return write


def test_parse_config_reads_the_positional_path(config):
    path = config("made.num_levels = 4\nmade.output_dir = 'x'\n")
    assert parse_config([str(path)]) == path
    assert made() == (4, 256, "x")


def test_scripts_tell_of_their_work_but_not_of_every_request(config):
    parse_config([str(config("made.num_levels = 4\nmade.output_dir = 'x'\n"))])
    assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)


def test_a_file_replaces_what_was_loaded_before(config):
    load_config(config("made.num_levels = 4\nmade.output_dir = 'x'\n"))
    load_config(config("made.output_dir = 'y'\n"))
    assert made() == (3, 256, "y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\nmade.num_level = 3",
            r"made.gin line 2: 'made' has no parameter 'num_level'; did you mean 'num_levels'\?",
        ),
        (
            "made.zzz = 3",
            "'made' has no parameter 'zzz'; there are codebook_size, num_levels, output_dir",
        ),
        ("maed.num_levels = 3", r"nothing named 'maed' to configure; did you mean 'made'\?"),
        ("made.num_levels = @maed()", r"nothing named 'maed' to configure; did you mean 'made'\?"),
        ("made.num_levels = [", "made.gin"),
        ("made.num_levels = three", "made.gin"),
        ("import no_such_module", "no_such_module"),
        ("include 'none.gin'", "none.gin"),
    ],
)
def test_a_bad_file_is_told_what_is_wrong_and_what_was_near(config, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config(text))


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="is no file; give a gin file"):
        load_config(tmp_path / "none.gin")


def test_a_bad_file_ends_the_program_with_one_message(config, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config([str(config("made.num_level = 3"))])
    assert ended.value.code == 2
    assert "did you mean 'num_levels'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("made.num_levels = 1", "Required bindings for `made` not provided.*output_dir"),
        ("made.output_dir = ''\nmade.codebook_size = 0", "codebook_size is 0; it must be at"),
    ],
)
def test_what_a_user_can_mend_is_one_message(config, text, message):
    with pytest.raises(SystemExit, match=message) as ended:
        run(made, [str(config(text))])
    assert "In call to configurable" not in str(ended.value.code)


def test_a_fault_of_the_program_shows_where(config):
    def fails():
        raise RuntimeError("some fault")

    with pytest.raises(RuntimeError, match="some fault"):
        run(fails, [str(config("made.num_levels = 1"))])
