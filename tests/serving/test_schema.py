"""Requests made up from our own OpenAPI description, right and wrong ones: no 5xx, no hang, nothing undescribed."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from .house import ADMIN, PROMPT, open_house

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
EXAMPLES = 12  # of each operation and mode
SECONDS = 30  # more is a hang
PUBLIC = {"/health"}
ADMINS = {
    "/metrics",
    "/admin/isolation",
    "/admin/live",
    "/admin/tenants",
    "/admin/tenants/{name}/rollback",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with open_house(tmp_path_factory.mktemp("house"), default_max_tokens=4) as house:
        yield house


@pytest.fixture(scope="module")
def schema(house):
    return schemathesis.openapi.from_dict(house.http().get("/openapi.json").json())


def operations(schema):
    return [result.ok() for result in schema.get_all_operations()]


def test_the_description_has_every_path(schema):
    paths = {operation.path for operation in operations(schema)}
    models = {"/v1/models", "/v1/models/{model_id}"}
    generating = {"/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream", "/"}
    assert paths == PUBLIC | ADMINS | models | generating


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_made_up_requests_find_nothing_undescribed(house, schema, mode):
    """Right by the description, then wrong by it. Names that exist are put in, so that some get to the engine."""
    statuses = set()
    for operation in operations(schema):
        takes_something = operation.body.items or operation.path_parameters.items
        if takes_something or mode is GenerationMode.POSITIVE:
            statuses |= statuses_of(operation, mode, house)
    assert {400} <= statuses if mode is GenerationMode.NEGATIVE else {200, 404} <= statuses
    after = house.openai("bolt").completions.create(model="bolt", prompt=PROMPT, max_tokens=8, temperature=0)
    assert after.choices[0].text == house.truth("bolt")


def statuses_of(operation, mode: GenerationMode, house) -> set[int]:
    """Try one operation; fails at the first answer that is not as described."""
    key = ADMIN if operation.path in ADMINS else house.keys["acme"]
    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case) -> None:
        if isinstance(case.body, dict):
            put_in_names(case.body)
        headers = {"authorization": f"Bearer {key}"}
        answer = case.call(base_url=house.url, headers=headers, timeout=SECONDS)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    ask()
    return statuses


def put_in_names(body: dict) -> None:
    """Of things that exist, in a request that is otherwise as it was made up; and not too many tokens."""
    if isinstance(body.get("model"), str) and len(body["model"]) % 2:
        body["model"] = "acme"
    for place in (body, body.get("parameters")):
        if isinstance(place, dict):
            for name in ("max_tokens", "max_completion_tokens", "max_new_tokens"):
                if type(place.get(name)) is int and 20 < place[name] < 2**31:
                    place[name] = 20
