"""Pages say what is so: links lead somewhere, commands and examples are taken by the program."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from rectokens.cli.app import app as library_cli
from server.api.admin.schemas import PutConstraintSetBody
from server.api.schemas import RecommendRequest, RecommendResponse
from server.api.score_schemas import ScoreRequest, ScoreResponse
from server.cli import app as server_cli
from server.errors import ERROR_TABLE
from server.jobs.params import ReindexParams, UpdateItemsParams

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def fenced(page: Path, *languages: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [body for language, body in blocks if language in languages]


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(fenced(page, "", "bash", "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(python|make) ", line)]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_exist_with_their_options(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    programs = {"rectokens": library_cli, "server": server_cli}
    for words in commands(page):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
            continue
        if words[1] != "-m":
            continue
        module = words[2]
        if module not in programs:
            if module.startswith("examples."):
                assert (ROOT / (module.replace(".", "/") + ".py")).exists(), words
            continue
        group = typer.main.get_command(programs[module])
        assert isinstance(group, click.Group) or hasattr(group, "commands")
        command = group.commands.get(words[3])
        assert command is not None, words
        known = {"--help"} | {
            name for option in command.params for name in (*option.opts, *option.secondary_opts)
        }
        used = {word.partition("=")[0] for word in words[4:] if word.startswith("--")}
        assert used <= known, f"{words}: {used - known}"


def test_settings_are_named_by_their_flags() -> None:
    """A switch takes no value: its other position is a flag of its own."""
    switches = {}
    for command in typer.main.get_command(server_cli).commands.values():  # type: ignore[attr-defined]
        for option in command.params:
            for name in (*option.opts, *option.secondary_opts):
                switches[name] = getattr(option, "is_flag", False)
    for page in PAGES:
        for flag, value in re.findall(
            r"(--[a-z]+\.[a-z0-9-]+)(?:[ =](true|false|yes|no)\b)?", page.read_text()
        ):
            assert flag in switches, f"{page.name}: {flag}"
            assert not (switches[flag] and value), f"{page.name}: {flag} {value}"


def test_the_readme_s_request_and_answer_have_the_shapes_of_the_api() -> None:
    readme = (ROOT / "README.md").read_text()
    (body,) = re.findall(r"-d '(\{.*?\})'", readme)
    RecommendRequest.model_validate_json(body)
    (answer,) = fenced(ROOT / "README.md", "json")
    RecommendResponse.model_validate(json.loads(answer))


def test_every_field_and_error_is_on_the_api_page() -> None:
    page = (ROOT / "docs/api.md").read_text()
    models = (RecommendRequest, RecommendResponse, ScoreRequest, ScoreResponse)
    for name in (name for model in models for name in model.model_fields):
        assert f"`{name}`" in page, name
    for kind, spec in ERROR_TABLE.items():
        row = rf"^\| [^|]*{spec.status}[^|]* \|[^|]*`{kind}`"
        assert re.search(row, page, re.MULTILINE), kind


def test_examples_of_the_admin_api_are_taken() -> None:
    models = {
        "reindex": ReindexParams,
        "items": UpdateItemsParams,
        "constraint-sets/buyable": PutConstraintSetBody,
    }
    (block,) = (b for b in fenced(ROOT / "docs/catalogs.md", "") if "--json" in b)
    words = shlex.split(block.replace("\\\n", " "), comments=True)
    found = {
        words[place - 1].removeprefix("$U/"): words[place + 1]
        for place, word in enumerate(words)
        if word == "--json"
    }
    assert found.keys() == models.keys()
    for route, body in found.items():
        models[route].model_validate_json(body)


def test_python_examples_name_things_that_exist() -> None:
    for page in PAGES:
        for block in fenced(page, "python"):
            imports = [line for line in block.splitlines() if re.match(r"(from|import) ", line)]
            exec(compile("\n".join(imports), str(page), "exec"), {})  # noqa: S102
