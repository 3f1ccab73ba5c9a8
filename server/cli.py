"""The command line: ``python -m server serve | batch | proxy | demo | ...``.

Commands import what they need when they run, so that ``--help`` and a refused setting are quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from server.access.command import add_access_commands
from server.flags import (
    USAGE_ERROR,
    fail,
    proxy_fields,
    setting_flags,
    settings_or_exit,
    with_setting_flags,
)
from server.job_commands import add_job_commands
from server.settings import Settings, SettingsError

app = typer.Typer(
    name="server",
    help="Recommendations over HTTP from a language model and a catalog.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: boxes leave too little room for names as long as these.
    rich_markup_mode=None,
)


@app.command()
@with_setting_flags
def serve(flags: dict[str, Any]) -> None:
    """Serve a model and a catalog: --model DIR --catalog DIR, or --release DIR; or follow a
    store, --store.path DIR_OR_URL, and serve whatever is active in it.

    Every flag is an environment variable too: --limits.max-top-k is
    RECTOKENS_LIMITS__MAX_TOP_K. All of them: docs/settings.md.

    Exit code: 0 after SIGTERM or SIGINT, 1 if the model or the catalog cannot be served or the
    address cannot be listened on, 2 for a setting that is unknown or not allowed.
    """
    settings = settings_or_exit(flags)
    fixed = settings.release is not None or settings.model is not None or settings.catalog
    if settings.store.path is not None:
        if fixed:
            fail(
                "--store.path serves what is active in the store; leave out --release, --model "
                "and --catalog",
                USAGE_ERROR,
            )
        if settings.with_proxy:
            fail(
                "--with-proxy does not follow a store; run `python -m server proxy` beside it",
                USAGE_ERROR,
            )
    elif settings.release is None and (settings.model is None or settings.catalog is None):
        fail(
            "nothing to serve; give --model and --catalog, or --release, or --store.path",
            USAGE_ERROR,
        )
    serve_until_signal(settings)


@app.command()
@setting_flags(proxy_fields())
def proxy(flags: dict[str, Any]) -> None:
    """Send prompts as compressed embeddings: --upstream URL --model DIR [--catalog DIR], or
    --store.path DIR_OR_URL for the model and the catalog that are active in a store.

    Takes OpenAI's completions and chats; holds the model's tokenizer and its input embeddings,
    not the model. With a catalog, prompts may name items as <item:ID>.

    Exit code: 0 after SIGTERM or SIGINT, 1 if the model, the catalog or the address cannot be
    used, 2 for a setting that is unknown or not allowed.
    """
    settings = settings_or_exit(flags)
    if settings.store.path is not None and (settings.model or settings.catalog):
        fail(
            "--store.path names the model and the catalog; leave out --model and --catalog",
            USAGE_ERROR,
        )
    if settings.proxy.upstream is None or (settings.model or settings.store.path) is None:
        fail(
            "nothing to send prompts to; give --upstream, and --model or --store.path", USAGE_ERROR
        )

    from server.proxy.errors import ProxyError
    from server.proxy.run import run_proxy
    from server.run import ListenError

    try:
        code = run_proxy(settings)
    except (ProxyError, ListenError) as error:
        fail(str(error), 1)
    except SettingsError as error:
        fail(str(error), USAGE_ERROR)
    raise typer.Exit(code)


@app.command()
@with_setting_flags
def demo(
    flags: dict[str, Any],
    data: Annotated[
        Path | None, typer.Option(help="Folder with Amazon data; generated data if left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Artifact store the demo is built in.")] = Path(".demo"),
    seed: Annotated[int, typer.Option(help="Of the data, the model and the training.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Of training, instead of the default.")] = None,
    train_seconds: Annotated[
        float | None, typer.Option(help="Time limit of training, in seconds.")
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(help="Measure Recall@10 and NDCG@10 on held-out items, through HTTP."),
    ] = False,
    evaluate_users: Annotated[
        int | None, typer.Option(help="Measure on a sample of so many users.")
    ] = None,
    serve: Annotated[
        bool | None,
        typer.Option("--serve/--no-serve", help="Serve the result; unless --evaluate is given."),
    ] = None,
    activate: Annotated[
        bool,
        typer.Option(
            "--activate", help="Make it the active release of --out, if none is active there yet."
        ),
    ] = False,
) -> None:
    """Build a demo once, from generated data or from --data DIR, and serve it.

    A demo that was built before is found again. With --evaluate it is measured beside
    popularity, and served only with --serve.
    """
    settings = settings_or_exit(flags)
    if settings.release or settings.model or settings.catalog or settings.store.path:
        fail(
            "demo serves what it builds; leave out --release, --model, --catalog, --store.path",
            USAGE_ERROR,
        )

    from server.demo.command import activate_first, curl_example, run_demo
    from server.demo.evaluate import EvaluationError
    from server.demo.running import ServerStartError

    try:
        result = run_demo(
            data,
            out,
            seed=seed,
            epochs=epochs,
            train_seconds=train_seconds,
            evaluate=evaluate,
            evaluate_users=evaluate_users,
        )
        if activate:
            activate_first(out, result.release)
    except (ValueError, OSError, ServerStartError, EvaluationError) as error:
        fail(str(error), 1)
    if serve or (serve is None and not evaluate):
        serve_until_signal(
            settings.model_copy(update={"release": result.release}),
            lambda base_url: print(
                f"\nready; try:\n\n  {curl_example(result.data, base_url)}\n", flush=True
            ),
        )


@app.command()
@with_setting_flags
def batch(
    flags: dict[str, Any],
    users: Annotated[
        Path, typer.Option("--in", help="Parquet file with columns user_id and history.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards and the summary.")],
    shard_rows: Annotated[int, typer.Option(min=1, help="Users in a shard.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the samples, at temperatures above 0.")] = 0,
) -> None:
    """Recommend to all users of a file: --in FILE --out DIR and what `serve` takes to serve.

    What every user gets is in the defaults: --defaults.top-k and so on. A run that was
    interrupted goes on when the command is given again. See docs/offline.md.

    Exit code: 0 when all users are done, 1 if the file, the folder or the release cannot be
    used or the device fails, 2 for a setting that is unknown or not allowed.
    """
    settings = settings_or_exit(flags)
    if settings.release is None and (settings.model is None or settings.catalog is None):
        fail("nothing to search; give --release, or --model and --catalog", USAGE_ERROR)

    from server.engine.types import EngineBrokenError
    from server.offline.command import run_offline
    from server.offline.errors import OfflineError
    from server.release import ReleaseError

    try:
        run_offline(settings, users, out, shard_rows=shard_rows, seed=seed)
    except (OfflineError, ReleaseError, OSError) as error:
        fail(str(error), 1)
    except EngineBrokenError as error:
        fail(f"the device has failed: {error}; give the command again to go on", 1)


@app.command("settings-doc")
def settings_doc() -> None:
    """Print docs/settings.md."""
    from server.settings_doc import settings_markdown

    sys.stdout.write(settings_markdown())


def serve_until_signal(
    settings: Settings, on_ready: Callable[[str], None] = lambda base_url: None
) -> NoReturn:
    """Serve what the settings name, then end with the service's exit code."""
    from server.following import StoreLink
    from server.proxy.errors import ProxyError
    from server.release import ReleaseError, load_release, release_paths
    from server.run import ListenError, run_service

    try:
        mounted = None
        if settings.with_proxy:
            from server.proxy.service import load_proxy

            mounted = load_proxy(settings, *release_paths(settings))
        if settings.store.path is not None:
            link = StoreLink.open(settings)
            code = run_service(settings, link.load_first, on_ready, link=link)
        else:
            code = run_service(settings, lambda: load_release(settings), on_ready, mounted)
    except (ListenError, ProxyError, ReleaseError) as error:
        fail(str(error), 1)
    except SettingsError as error:
        fail(str(error), USAGE_ERROR)
    raise typer.Exit(code)


add_job_commands(app)
add_access_commands(app)


def main() -> None:
    """Run the command line."""
    app()
