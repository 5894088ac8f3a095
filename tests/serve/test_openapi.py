"""The application against its own OpenAPI document, with schemathesis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from support.serving import ScriptedWorker, chat, client_of, make_answerer, make_app

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
    """The document, loaded from the application itself."""
    app = make_app(make_answerer(directory, ScriptedWorker(tokens=("red",))))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_these_are_all_operations(document: Any) -> None:
    found = {(one.ok().method.upper(), one.ok().path) for one in document.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*one, "positive") for one in OPERATIONS] + [("POST", "/v1/chat/completions", "negative")],
)
def test_every_operation_keeps_to_its_description(
    document: Any, method: str, path: str, mode: str
) -> None:
    """No 5xx, only described statuses, answers of the described shape; good input and bad.

    By its strategies, not its pytest plugin, which does not work with every pytest.
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
                # Keys are asked for only where some are set.
                schemathesis.checks.ignored_auth,
                # Valid by its schema, refused for what it says: a model that is not here.
                schemathesis.checks.positive_data_acceptance,
                # `null` fields are as if they were not there.
                schemathesis.checks.negative_data_rejection,
            ],
        )

    run()
    assert seen


def test_the_document_describes_the_request(app: Any) -> None:
    import asyncio

    async def run() -> dict[str, Any]:
        async with client_of(app) as client:
            return (await client.get("/openapi.json")).json()

    document = asyncio.run(run())
    request = document["components"]["schemas"]["ChatRequest"]
    assert {"budget", "deadline_ms", "strict", "plan"} <= set(request["properties"])
    whole = {"$ref": "#/components/schemas/ChatRequest", "components": document["components"]}
    jsonschema.validate(chat("data:image/png;base64,AA", budget=0.5), whole)
    jsonschema.validate(chat(budget="0.5"), whole)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(chat(speed=1), whole)
