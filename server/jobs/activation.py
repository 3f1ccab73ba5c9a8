"""Activate and roll back, through the gate; and what jobs do with a catalog they have made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rectokens.artifacts.activation import Activation
from rectokens.artifacts.errors import ArtifactError, UnreadableError
from rectokens.artifacts.release import ReleaseArtifact
from rectokens.artifacts.release_store import (
    ANY_RELEASE,
    ActivationConflictError,
    ExpectedActive,
)
from server.jobs.context import JobEnvironment, JobReporter
from server.jobs.gate import ProposedActivation
from server.jobs.params import ActivateParams, GatedParams, RollbackParams
from server.jobs.types import JobCancelledError, JobErrorKind, JobFailure


def activate(
    params: ActivateParams, environment: JobEnvironment, reporter: JobReporter
) -> dict[str, Any]:
    """Make a release active, or a catalog with a model.

    Returns:
        ``release``, ``model``, ``catalog`` (None should the store fail just then), ``sequence`` of
        the activation; ``gate``, its report; ``servers``, which of them serve the release by now.

    Raises:
        JobFailure: the gate blocks it, or another release is active than expected.
        ArtifactError: a part is missing, damaged, or does not belong to the other.
    """
    store = environment.store
    if params.release is not None:
        release = params.release
    else:
        assert params.catalog is not None
        if params.model is None:
            if store.active() is None:
                raise JobFailure(
                    JobErrorKind.CONFLICT,
                    "no release is active, so there is no model to serve the catalog with; name "
                    "one, too",
                )
            release = store.bind_catalog(params.catalog)
        else:
            release = store.bind(params.model, params.catalog)
    expected = ANY_RELEASE if params.expected_active is None else params.expected_active
    return activate_release(release, params, environment, reporter, expected=expected)


def rollback(
    params: RollbackParams, environment: JobEnvironment, reporter: JobReporter
) -> dict[str, Any]:
    """Go back to the release that was active before.

    Returns:
        As :func:`activate`.

    Raises:
        JobFailure: the gate blocks it, or another release is active than expected.
        ArtifactError: there is nothing to go back to, or it is missing or damaged.
    """
    store = environment.store
    current = store.active()
    expected = params.expected_active
    if expected is None and current is not None:
        expected = current.release  # what the gate is about to compare with
    report = None
    if current is not None and current.previous is not None:
        try:
            report = _pass_gate(current.previous, params, environment, reporter)
        except ArtifactError as error:
            if store.active() == current:
                raise
            # What was the previous release a moment ago may be let go of by now.
            raise JobFailure(
                JobErrorKind.CONFLICT, f"another release was activated meanwhile: {error}"
            ) from error
    reporter.progress(0.9, "verifying the release")
    try:
        record = store.rollback(
            expected_active=ANY_RELEASE if expected is None else expected, note=params.note
        )
    except ActivationConflictError as error:
        raise JobFailure(JobErrorKind.CONFLICT, str(error)) from error
    return _outcome(record, environment, reporter, report)


def activate_release(
    release: str,
    params: GatedParams,
    environment: JobEnvironment,
    reporter: JobReporter,
    *,
    expected: ExpectedActive,
) -> dict[str, Any]:
    """Make a release active if the gate lets it pass; see :func:`activate`."""
    report = _pass_gate(release, params, environment, reporter)
    reporter.progress(0.9, "verifying the release")
    try:
        record = environment.store.activate(release, expected_active=expected, note=params.note)
    except ActivationConflictError as error:
        raise JobFailure(
            JobErrorKind.CONFLICT, f"release {release} is made but was not activated: {error}"
        ) from error
    reporter.log(f"release {release} is active, activation {record.sequence}")
    return _outcome(record, environment, reporter, report)


def forget_old_versions(environment: JobEnvironment, reporter: JobReporter) -> dict[str, Any]:
    """Remove catalogs and releases that the policy lets go, and what killed writers left.

    What a job was asked for is done by then, so nothing here makes it fail: the next job tries
    again.

    Returns:
        ``removed``, the versions; ``not_removed``, why not, where that failed.
    """
    store = environment.store
    outcome: dict[str, Any] = {"removed": []}
    reasons: list[str] = []

    @contextmanager
    def trying(what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            reporter.log(f"{what} until the next job: {reasons[-1]}")

    with trying("old versions stay"):
        removed = store.apply_retention(environment.retention, kinds=("release", "catalog"))
        outcome["removed"] = [f"{one.kind} {one.version}" for one in removed]
        if removed:
            reporter.log(f"removed {', '.join(outcome['removed'])}")
    # Also where an old version that cannot be read is in the way of the others.
    with trying("what was left unfinished stays"):
        leftovers = store.clean()
        if leftovers:
            reporter.log(f"removed what was left unfinished: {', '.join(leftovers)}")
    if reasons:
        outcome["not_removed"] = "; ".join(reasons)
    return outcome


def _pass_gate(
    release: str, params: GatedParams, environment: JobEnvironment, reporter: JobReporter
) -> dict[str, Any] | None:
    if environment.gate is None:
        if params.gate is not None:
            raise JobFailure(
                JobErrorKind.INVALID_PARAMETERS,
                "gate options are given, but no activation gate is configured here",
            )
        return None
    store = environment.store
    with reporter.stage(0.0, 0.9, "trying the release"):
        report = environment.gate(
            ProposedActivation(
                current=_current(environment, reporter),
                proposed=store.open_release(release),
                options=params.gate,
                reporter=reporter,
            )
        )
    return None if report is None else dict(report)


def _current(environment: JobEnvironment, reporter: JobReporter) -> ReleaseArtifact | None:
    """The active release; None where it is damaged, which calls for another the more."""
    try:
        return environment.store.open_active()
    except UnreadableError:
        raise
    except ArtifactError as error:
        reporter.log(f"the active release cannot be opened: {error}")
        return None


def _outcome(
    record: Activation,
    environment: JobEnvironment,
    reporter: JobReporter,
    report: dict[str, Any] | None,
) -> dict[str, Any]:
    # It is active by now, whoever has seen it: nothing here may make the job fail.
    model = catalog = servers = None
    try:
        opened = environment.store.open_release(record.release)
        model, catalog = opened.model_version, opened.catalog_version
    except Exception as error:
        reporter.log(f"cannot tell what it is made of: {type(error).__name__}: {error}")
    if environment.follow is not None:
        try:
            reporter.progress(0.95, "waiting for the serving processes to follow")
            servers = environment.follow(record.release, reporter)
        except JobCancelledError:
            reporter.log("not waiting for the serving processes: asked to stop")
        except Exception as error:
            reporter.log(f"cannot tell which processes serve it: {type(error).__name__}: {error}")
    return {
        "release": record.release,
        "model": model,
        "catalog": catalog,
        "sequence": record.sequence,
        "gate": report,
        "servers": servers,
    }
