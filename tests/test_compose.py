"""docker-compose.yml as its text says it; `make test-docker` runs it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

SERVICES: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "docker-compose.yml").read_text("utf-8"))[
    "services"
]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_more_rights_and_room_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "mem_limit" in service
    assert {"max-size", "max-file"} <= service["logging"]["options"].keys()


def test_only_workers_have_the_hubs_token() -> None:
    assert {name for name, service in SERVICES.items() if "HF_TOKEN" in service["environment"]} == {
        "worker",
        "worker-gpu",
    }


def test_redis_is_reached_by_the_other_services_only() -> None:
    assert "ports" not in SERVICES["redis"] and SERVICES["redis"]["networks"] == ["redis"]
    for name, service in SERVICES.items():
        if name != "redis":
            assert "redis-password:/password:ro" in service["volumes"]
