"""What a deployment on Ray is told, checked before anything starts. Needs no Ray."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from server.settings import Settings, load_settings

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
_Header = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,64}$")]

ROUTER = "router"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Autoscaling(_Strict):
    """How many replicas there are, by the beam rows that wait or run.

    Attributes:
        min_replicas: the fewest; one that has no request costs its GPU all the same.
        max_replicas: the most.
        target_beam_rows: wanted on average in each replica, waiting and running.
        upscale_delay_s: how long more must be wanted, in seconds.
        downscale_delay_s: how long fewer must be wanted, in seconds.
        look_back_s: over which beam rows are averaged, in seconds.
    """

    min_replicas: int = Field(default=1, ge=1, le=10_000)
    max_replicas: int = Field(ge=1, le=10_000)
    target_beam_rows: float = Field(default=512.0, gt=0)
    upscale_delay_s: float = Field(default=15.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    # Ray's replicas report every 10 s.
    look_back_s: float = Field(default=30.0, gt=10)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}; it may be at most max_replicas, "
                f"{self.max_replicas}"
            )
        return self


class Variant(_Strict):
    """One model with its catalogs, on replicas of its own.

    Attributes:
        name: of the variant: in `X-Variant` and in metrics.
        weight: share of the users, relative to the others'; 0 is reached by its name only.
        settings: dotted names as in docs/settings.md; over the variables of the environment.
        replicas: how many, where it is not scaled; 1 if left out.
        autoscaling: in place of `replicas`.
        num_gpus: of a replica, a fraction to share one.
        num_cpus: of a replica.
    """

    name: _Name
    weight: float = Field(default=1.0, ge=0, le=1e9)
    settings: dict[str, str | int | float | bool] = Field(default_factory=dict)
    replicas: int | None = Field(default=None, ge=1, le=10_000)
    autoscaling: Autoscaling | None = None
    num_gpus: float = Field(default=1.0, ge=0)
    num_cpus: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _one_way_to_scale(self) -> Self:
        if self.autoscaling is not None and self.replicas is not None:
            raise ValueError(f"variant {self.name!r} has replicas and autoscaling; give one")
        if self.name == ROUTER:
            raise ValueError(f"{ROUTER!r} is no name for a variant; the router has it")
        return self

    def load_settings(self) -> Settings:
        """The settings of its replicas.

        Raises:
            SettingsError: one is unknown or has a bad value.
            ValueError: what to serve is missing, or said twice.
        """
        settings = load_settings(
            {
                name: value if isinstance(value, bool) else str(value)
                for name, value in self.settings.items()
            }
        )
        fixed = settings.release is not None or (
            settings.model is not None and settings.catalog is not None
        )
        if fixed == (settings.store.path is not None):
            raise ValueError(
                f"variant {self.name!r} needs store.path, or release, or model and catalog"
            )
        return settings


class RouterConfig(_Strict):
    """The part that takes requests from Ray's proxies and gives them to variants.

    Attributes:
        replicas: how many; no GPU.
        num_cpus: of one.
        user_header: says which user a request is for.
        experiment: another name divides the users anew.
        named_variants: let callers choose with `X-Variant`.
        attempts: most replicas that one request is given to; the others after one is lost.
    """

    replicas: int = Field(default=2, ge=1, le=1_000)
    num_cpus: float = Field(default=1.0, ge=0)
    user_header: _Header = "X-User-ID"
    experiment: str = Field(default="", max_length=256)
    named_variants: bool = True
    attempts: int = Field(default=3, ge=1, le=10)


class Division(_Strict):
    """Which users go where: `user_config` of the router, which may change while it runs.

    Attributes:
        weights: of all variants, by name.
        experiment: another name divides the users anew.
    """

    weights: dict[str, Annotated[float, Field(ge=0, le=1e9)]]
    experiment: str = Field(default="", max_length=256)

    def check(self, variants: Iterable[str]) -> None:
        """Refuse what does not fit the variants there are.

        Raises:
            ValueError: a variant is missing or unknown, or none has a weight above 0.
        """
        wanted = set(variants)
        if self.weights.keys() != wanted:
            raise ValueError(
                f"weights are of {', '.join(sorted(self.weights)) or 'nothing'}; the variants are "
                f"{', '.join(sorted(wanted))}"
            )
        if not any(weight > 0 for weight in self.weights.values()):
            raise ValueError("no variant has a weight above 0")


class ServeConfig(_Strict):
    """All of it: `args` of an application in a Serve config file.

    Attributes:
        variants: at least one; the first answers requests that name no user.
        router: see there.
    """

    variants: tuple[Variant, ...] = Field(min_length=1)
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        names = [variant.name for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two variants are called {name!r}")
        if not any(variant.weight > 0 for variant in self.variants):
            raise ValueError("no variant has a weight above 0")
        return self

    @property
    def division(self) -> Division:
        """Which users go where until the router is told another one."""
        weights = {variant.name: variant.weight for variant in self.variants}
        return Division(weights=weights, experiment=self.router.experiment)
