"""The application that Ray Serve runs: ``import_path: deploy.ray.app:build``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray.asgi import HttpRequest, HttpResponse, ResponseStart
from deploy.ray.autoscaling import BeamRowsPolicy
from deploy.ray.config import ROUTER, Division, ServeConfig, Variant
from deploy.ray.handles import ReplicaLostError
from deploy.ray.replica import VariantServer, create_service_app
from deploy.ray.router import create_router_app
from server.api.middleware import REQUEST_ID_HEADER
from server.logs import configure_logging
from server.settings import Settings

# Replicas that do not tell in time how they are, or what they count, are left out.
_ALL_TIMEOUT_S = 5.0
_HEALTH_PERIOD_S = 2.0
_HEALTH_TIMEOUT_S = 30.0
# The service writes a line about what matters; Ray would write three about every request.
_LOGGING = {"enable_access_log": False}
# Beyond the drain: the engine's last batch, and letting go of the store.
_AFTER_DRAIN_S = 15.0

_LOST = (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    ReplicaUnavailableError,
    DeploymentUnavailableError,
)


def build(args: ServeConfig | dict[str, Any]) -> serve.Application:
    """All deployments of one application.

    Args:
        args: what a Serve config file has under ``args``.

    Raises:
        ValidationError: that is not a ``ServeConfig``.
        SettingsError: a variant's settings are not accepted.
        ValueError: a variant does not say what it serves.
    """
    config = ServeConfig.model_validate(args)
    settings = {variant.name: variant.load_settings() for variant in config.variants}
    handles = {
        variant.name: _replicas(variant, settings[variant.name]).bind(
            variant.name, variant.model_dump()
        )
        for variant in config.variants
    }
    return _routers(config, settings).bind(config.model_dump(), handles)


def _replicas(variant: Variant, settings: Settings) -> serve.Deployment:
    options: dict[str, Any] = {
        "name": variant.name,
        "ray_actor_options": {"num_cpus": variant.num_cpus, "num_gpus": variant.num_gpus},
        "max_ongoing_requests": _most_ongoing(settings),
        "logging_config": _LOGGING,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + _AFTER_DRAIN_S,
    }
    scaling = variant.autoscaling
    if scaling is None:
        options["num_replicas"] = variant.replicas or 1
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
            look_back_period_s=scaling.look_back_s,
            policy=AutoscalingPolicy(
                policy_function=BeamRowsPolicy,
                policy_kwargs={"target_beam_rows": scaling.target_beam_rows},
            ),
        )
    return serve.deployment(**options)(VariantReplica)


def _routers(config: ServeConfig, settings: dict[str, Settings]) -> serve.Deployment:
    every = settings.values()
    return serve.deployment(
        name=ROUTER,
        num_replicas=config.router.replicas,
        ray_actor_options={"num_cpus": config.router.num_cpus},
        max_ongoing_requests=sum(map(_most_ongoing, every)),
        logging_config=_LOGGING,
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=max(one.drain_timeout_s for one in every) + _AFTER_DRAIN_S,
    )(serve.ingress()(RouterReplica))


def _most_ongoing(settings: Settings) -> int:
    """Requests that Ray gives a replica at once.

    What waits is for the service to bound: it answers 429 with the time to come back.
    """
    return 2 * settings.batching.max_queued_requests + settings.batching.max_requests


def _own_replica() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


class VariantReplica:
    """One replica of a variant: a process with a model."""

    async def __init__(self, name: str, variant: dict[str, Any]) -> None:  # type: ignore[misc]
        settings = Variant.model_validate(variant).load_settings()
        configure_logging(settings.log_level)
        self._server = VariantServer(name, _own_replica(), create_service_app(settings))
        await self._server.start()

    async def call(self, request: HttpRequest) -> HttpResponse:
        """See ``VariantServer.call``."""
        return await self._server.call(request)

    async def stream(self, request: HttpRequest) -> AsyncGenerator[ResponseStart | bytes]:
        """See ``VariantServer.stream``."""
        async with aclosing(self._server.stream(request)) as parts:
            async for part in parts:
                yield part

    async def check_health(self) -> None:
        """Ray replaces a replica for which this fails."""
        self._server.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray hands this to the autoscaling policy."""
        return self._server.load()

    async def __del__(self) -> None:
        """Ray calls this when a replica is to end, and waits for it."""
        if hasattr(self, "_server"):
            await self._server.stop()


class RouterReplica:
    """One router: a process without a model."""

    def __init__(self, config: dict[str, Any], variants: dict[str, DeploymentHandle]) -> None:
        self._config = ServeConfig.model_validate(config)
        self._variants = {name: RayVariant(handle) for name, handle in variants.items()}

    def __serve_build_asgi_app__(self) -> Any:
        """The app that Ray serves."""
        settings = {one.name: one.load_settings() for one in self._config.variants}
        configure_logging(next(iter(settings.values())).log_level)
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)

        async def router_pages() -> list[tuple[str, str]]:
            return await _broadcast(handle, "metrics_page")

        app = create_router_app(self._config, settings, self._variants, router_pages)
        app.add_middleware(WithoutRequestId)
        self._state = app.state
        return app

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Ray calls this with another `user_config`, a ``Division``; the process stays."""
        self._state.router.divide(Division.model_validate(user_config))

    async def metrics_page(self) -> tuple[str, str]:
        """Name of this router, and its metrics."""
        return _own_replica(), self._state.metrics.render().decode()


class WithoutRequestId:
    """Leaves the header out of answers: Ray's proxy adds it, and clients would see it twice.

    Args:
        app: what is left without it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID_HEADER]
            await send(message)

        await self._app(scope, receive, send_without)


class RayVariant:
    """A :class:`~deploy.ray.handles.VariantHandle` over Ray's.

    Args:
        handle: of the variant's deployment.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._call = handle.options(method_name="call")
        self._stream = handle.options(method_name="stream", stream=True)

    async def call(self, request: HttpRequest) -> HttpResponse:
        """See ``VariantHandle.call``."""
        try:
            answer: HttpResponse = await self._call.remote(request)
        except Exception as error:
            raise _lost_or_same(error) from error
        return answer

    async def stream(self, request: HttpRequest) -> AsyncGenerator[ResponseStart | bytes]:
        """See ``VariantHandle.stream``."""
        parts = self._stream.remote(request)
        ended = False
        try:
            async for part in parts:
                yield part
            ended = True
        except Exception as error:
            ended = True
            raise _lost_or_same(error) from error
        finally:
            if not ended:
                parts.cancel()

    async def call_all(self, request: HttpRequest) -> list[HttpResponse]:
        """See ``VariantHandle.call_all``."""
        return await _broadcast(self._handle, "call", request)


async def _broadcast(handle: DeploymentHandle, method: str, *args: Any) -> list[Any]:
    try:
        found = await handle.broadcast(method, *args).results_async(
            timeout_s=_ALL_TIMEOUT_S, return_exceptions=True
        )
    except (*_LOST, TimeoutError):
        return []
    return [one for one in found if not isinstance(one, BaseException)]


def _lost_or_same(error: Exception) -> Exception:
    """What Ray says when a replica has gone, as one error; anything else unchanged."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, _LOST):
        return ReplicaLostError(type(cause).__name__)
    return error
