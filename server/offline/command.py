"""``python -m server batch``: loading, the progress bar, and what is said at the end."""

from __future__ import annotations

import time
from pathlib import Path

from rectokens.cli.progress import progress_bar, say
from server.logs import configure_logging
from server.offline.run import recommend_offline
from server.offline.users import UsersFile
from server.release import load_release
from server.settings import Settings


def run_offline(
    settings: Settings, users_path: Path, out: Path, *, shard_rows: int, seed: int
) -> None:
    """Answer all users of a file with what the settings name.

    Raises:
        OfflineError: the file or the folder cannot be used.
        ReleaseError: nothing can be served from what the settings name.
        EngineBrokenError: the device does not work any more.
    """
    configure_logging(settings.log_level)
    users = UsersFile(users_path)
    if users.ignored:
        say(f"columns not read: {', '.join(users.ignored)}")
    # Everybody comes once. And what is rounded must not depend on who came before, or a run that
    # was interrupted would not be the same as one that was not.
    engine = settings.engine.model_copy(update={"prefix_cache": False})
    release = load_release(settings.model_copy(update={"engine": engine}))
    began = time.monotonic()
    with progress_bar("users", users.rows) as bar:

        def show(done: int, now: int) -> None:
            rate = now / max(time.monotonic() - began, 1e-9)
            bar(done, f"{done:,} of {users.rows:,} users, {rate:,.0f} a second")

        summary = recommend_offline(
            users, out, release, settings, shard_rows=shard_rows, seed=seed, progress=show
        )
    last = summary["last_run"]
    errors = ", ".join(f"{count:,} {code}" for code, count in summary["errors"].items())
    say(
        f"{summary['users']:,} users in {out}: {summary['answered']:,} answered"
        + (f"; errors: {errors}" if errors else "")
        + f"; {last['users']:,} in this run, {last['users_per_s']:,.0f} a second"
    )
