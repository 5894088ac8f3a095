"""The application against its own OpenAPI document, with schemathesis."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, settings
from support.serving import ScriptedWorker, chat, client_of, make_answerer, make_app

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def described(directory: Any) -> Any:
    """The document, loaded from the application itself."""
    app = make_app(make_answerer(directory, ScriptedWorker(tokens=("red",))))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_operation_keeps_to_its_description(case: Any) -> None:
    """No 5xx, only described statuses, answers of the described shape."""
    case.call_and_validate(
        excluded_checks=[
            # 401 only where keys are set; methods outside the document get 405 in our own shape.
            schemathesis.checks.ignored_auth,
            # A field may be valid by its schema and refused for what it says (an unknown model).
            schemathesis.checks.positive_data_acceptance,
        ]
    )


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
