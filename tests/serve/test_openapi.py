"""The application is tested against its own OpenAPI document, with schemathesis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from support.serving import ScriptedWorker, chat, client_of, make_app, make_chat_model

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


OPERATIONS = [
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/chat/completions"),
]


@pytest.fixture(scope="module")
def document(directory: Path) -> Any:
    """The document, loaded from the application."""
    worker = ScriptedWorker(tokens=("red",))
    app = make_app(make_chat_model(directory, worker, allowed_hosts=("testserver",)))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_operations_are_complete(document: Any) -> None:
    results = [result.ok() for result in document.get_all_operations()]
    assert {(result.method.upper(), result.path) for result in results} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*operation, "positive") for operation in OPERATIONS]
    + [("POST", "/v1/chat/completions", "negative")],
)
def test_operation_conforms_to_the_document(
    document: Any, method: str, path: str, mode: str
) -> None:
    """No 5xx, documented statuses and bodies only, for valid and for invalid input.

    Uses the strategies of schemathesis, not its pytest plugin, which needs certain pytest versions.
    """
    operation = document[path][method]
    kind = schemathesis.GenerationMode(mode)
    cases = operation.as_strategy(generation_mode=kind)
    seen: set[int] = set()

    @settings(
        max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=cases)
    def run(case: Any) -> None:
        response = case.call()
        seen.add(response.status_code)
        case.validate_response(
            response,
            excluded_checks=[
                # Keys are needed only if some are configured.
                schemathesis.checks.ignored_auth,
                # Valid by the schema, but rejected: a model that is not served.
                schemathesis.checks.positive_data_acceptance,
                # Null fields are treated as absent.
                schemathesis.checks.negative_data_rejection,
            ],
        )

    run()
    assert seen


def test_document_has_the_request_schema(app: Any) -> None:
    import asyncio

    async def run() -> dict[str, Any]:
        async with client_of(app) as client:
            return (await client.get("/openapi.json")).json()

    document = asyncio.run(run())
    request = document["components"]["schemas"]["ChatRequest"]
    assert {"budget", "deadline_ms", "strict", "plan"} <= set(request["properties"])
    schema = {"$ref": "#/components/schemas/ChatRequest", "components": document["components"]}
    jsonschema.validate(chat("data:image/png;base64,AA", budget=0.5), schema)
    jsonschema.validate(chat(budget="0.5"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(chat(speed=1), schema)
