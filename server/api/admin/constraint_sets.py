"""``/admin/constraint-sets``: named subsets of the items, by list or by condition."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request
from starlette.convertors import Convertor, register_url_convertor
from starlette.responses import Response

from rectokens.catalog.catalog import Catalog
from rectokens.catalog.constraint_sets import require_set_name
from rectokens.catalog.predicates import Predicate, PredicateError
from server.api.admin.common import (
    ACCEPTED,
    READ_ERRORS,
    SUBMIT_ERRORS,
    IdempotencyKey,
    admin_router,
    submit,
)
from server.api.admin.gates import check_gate
from server.api.admin.schemas import (
    ConstraintSetDetail,
    ConstraintSetList,
    PutConstraintSetBody,
)
from server.api.dependencies import service_of
from server.api.responses import JSONResponse, documented_errors
from server.errors import ErrorKind, ServiceError, invalid
from server.jobs.params import DeleteConstraintSetParams, PutConstraintSetParams
from server.jobs.types import JobKind

router = admin_router()


class _AnyName(Convertor[str]):
    """A part of a path to its end, whatever is in it; starlette's own stops at a line break."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        """As it is."""
        return value

    def to_string(self, value: str) -> str:
        """As it is."""
        return value


register_url_convertor("set_name", _AnyName())

SetName = Annotated[
    str, Path(min_length=1, max_length=200, description="Of the set; percent-encoded.")
]


@router.get(
    "/admin/constraint-sets",
    summary="Constraint sets that are served",
    response_model=ConstraintSetList,
    responses=documented_errors(*READ_ERRORS, ErrorKind.LOADING),
)
async def list_sets(request: Request) -> Response:
    """Of the catalog that is served now."""
    catalog = _catalog(request)
    return JSONResponse(
        {
            "catalog_version": catalog.version,
            "constraint_sets": [
                _summary(name, catalog) for name in sorted(catalog.constraint_sets)
            ],
        }
    )


@router.get(
    "/admin/constraint-sets/{name:set_name}",
    summary="One constraint set",
    response_model=ConstraintSetDetail,
    responses=documented_errors(*READ_ERRORS, ErrorKind.NOT_FOUND, ErrorKind.LOADING),
)
async def get_set(
    name: SetName,
    request: Request,
    limit: Annotated[int, Query(ge=0, le=10_000, description="Most item ids told.")] = 100,
    offset: Annotated[int, Query(ge=0, lt=2**31, description="Items passed over.")] = 0,
) -> Response:
    """Its definition and a part of its items, in catalog order."""
    catalog = _catalog(request)
    if name not in catalog.constraint_sets:
        raise ServiceError(
            ErrorKind.NOT_FOUND,
            f"constraint set {name!r} is not in catalog {catalog.version}",
            param="name",
        )
    items = catalog.constraint_sets[name][offset : offset + limit]
    return JSONResponse(
        {
            **_summary(name, catalog),
            "catalog_version": catalog.version,
            "offset": offset,
            "item_ids": catalog.ids_of(items),
        }
    )


@router.put(
    "/admin/constraint-sets/{name:set_name}",
    summary="Add or replace a constraint set",
    responses=documented_errors(*SUBMIT_ERRORS),
    **ACCEPTED,
)
async def put_set(
    name: SetName, body: PutConstraintSetBody, request: Request, key: IdempotencyKey = None
) -> Response:
    """A list of item ids, or a predicate over metadata columns; a new catalog version."""
    try:
        require_set_name(name)
    except ValueError as error:
        raise invalid("name", str(error)) from None
    if (body.item_ids is None) == (body.predicate is None):
        raise invalid("item_ids", "give one of item_ids and predicate, not both or neither")
    if body.predicate is not None:
        try:
            Predicate(body.predicate)
        except PredicateError as error:
            raise invalid("predicate", str(error)) from None
    check_gate(body.gate, request)
    params = PutConstraintSetParams(name=name, **body.model_dump(exclude_unset=True))
    return await submit(request, JobKind.PUT_CONSTRAINT_SET, params, key)


@router.delete(
    "/admin/constraint-sets/{name:set_name}",
    summary="Remove a constraint set",
    responses=documented_errors(*SUBMIT_ERRORS, ErrorKind.NOT_FOUND),
    **ACCEPTED,
)
async def delete_set(name: SetName, request: Request, key: IdempotencyKey = None) -> Response:
    """Requests that name it are refused from then on."""
    params = DeleteConstraintSetParams(name=name)
    return await submit(request, JobKind.DELETE_CONSTRAINT_SET, params, key)


def _catalog(request: Request) -> Catalog:
    release = service_of(request).release
    if release is None:
        raise ServiceError(ErrorKind.LOADING, "the model is being loaded", retry_after_s=1.0)
    return release.catalog


def _summary(name: str, catalog: Catalog) -> dict[str, object]:
    return {
        "name": name,
        "num_items": catalog.constraint_sets[name].numel(),
        "predicate": catalog.predicates.get(name),
    }
