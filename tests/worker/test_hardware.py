"""Slots: how a machine is shared out, and what is refused."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from gptcore.environment import hub_token
from trainmaster.client import TrainmasterError
from trainmaster.published import fetch_spec
from worker.hardware import find_slots
from worker.place import node_address, node_id, runs_root_id
from worker.settings import BadSetting, Settings
from worker.trainer import slot_cores

HOME = Settings(home=Path("/nowhere"), device="cpu")


def test_by_default_one_slot_has_every_core() -> None:
    (slot,) = find_slots(HOME, "n")
    assert slot.id == "n-0" and slot.cores == slot_cores()
    assert slot.hardware.ranks == len(slot.cores) and slot.hardware.memory_bytes


def test_ranges_of_cores_become_slots() -> None:
    first = slot_cores()[0]
    (slot,) = find_slots(replace(HOME, slots=f"{first}"), "n")
    assert slot.cores == [first]


@pytest.mark.parametrize(
    ("slots", "message"),
    [("0-999999", "is not there"), ("x", "is no range"), ("0,0", "twice"), ("1-0", "empty range")],
)
def test_ranges_that_cannot_be_are_refused(slots: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_slots(replace(HOME, slots=slots), "n")


def test_settings_survive_the_way_through_an_environment() -> None:
    settings = replace(
        HOME, pool="gpus", slots="0", node="n", address="10.0.0.7", grace_seconds=3.5, max_attempts=7, trainer="a b"
    )
    assert Settings.from_environment(settings.to_environment()) == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRAINMASTER_DEVICE", "tpu"),
        ("TRAINMASTER_GRACE_SECONDS", "-1"),
        ("TRAINMASTER_MAX_ATTEMPTS", "x"),
        ("TRAINMASTER_NODE", "../up"),
    ],
)
def test_a_bad_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} '{value}'"):
        Settings.from_environment({name: value})


@pytest.mark.parametrize("name", ["TRAINMASTER_HOME", "TRAINMASTER_REDIS_URL", "HF_TOKEN", "HF_ENDPOINT"])
def test_a_value_in_quotes_is_refused_without_repeating_it(name: str) -> None:
    """As docker's --env-file passes it on."""
    for value in ('"hf_secret"', " 'hf_secret'"):
        with pytest.raises(BadSetting, match=f"{name} has quotes around its value; remove them") as refused:
            Settings.from_environment({name: value})
        assert "hf_secret" not in str(refused.value)
    quoted = '"/my trainer" "one argument"'
    assert Settings.from_environment({"TRAINMASTER_TRAINER": quoted}).trainer == quoted


@pytest.mark.parametrize("token", ["hf_sécret", "hf_s\u200becret", "hf_s ecret", "hf_s\necret", "hf_s\u2026"])
def test_a_token_that_no_header_carries_is_refused_before_it_is_sent(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        with pytest.raises(BadSetting, match=rf"{name}: character \d of \d+ is .*; copy the token again") as refused:
            Settings.from_environment({name: token})
        assert token not in str(refused.value)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(TrainmasterError, match="copy the token again"):
        fetch_spec("hf://owner/name")
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")  # as from a file
    assert hub_token() == "hf_secret"


def test_a_home_under_two_spellings_is_one_node(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    one, other = (
        Settings.from_environment({"TRAINMASTER_HOME": str(tmp_path / name)}) for name in ("home", "link/../link")
    )
    assert one == other and node_id(one) == node_id(other)


def test_a_home_of_links_in_a_circle_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").symlink_to(tmp_path / "home")
    with pytest.raises(
        BadSetting, match=r"home.*(loop of|levels of) symbolic links.*; set TRAINMASTER_HOME to a folder"
    ):
        Settings.from_environment({"TRAINMASTER_HOME": str(tmp_path / "home")}).make_home()


def test_a_user_without_a_home_directory_is_told_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # not in /etc/passwd
    with pytest.raises(BadSetting, match=r"^~/.trainmaster names no folder, .*; set TRAINMASTER_HOME to a folder"):
        Settings.from_environment({})
    for home in ("/proc/.trainmaster", "/etc/passwd"):  # as HOME=/ is to most users; a file
        with pytest.raises(BadSetting, match=f"{home} cannot be written .*; set TRAINMASTER_HOME"):
            Settings(home=Path(home)).make_home()


def test_a_new_home_is_its_owners_alone_and_an_open_one_is_warned_of(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    settings.make_home()
    assert settings.home.stat().st_mode & 0o777 == 0o700 and settings.open_to_others() == ""
    settings.home.chmod(0o755)
    settings.make_home()
    assert "chmod 700 keeps" in settings.open_to_others()


def test_the_password_of_redis_may_lie_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("a/b c\n")
    given = {"TRAINMASTER_REDIS_PASSWORD_FILE": str(tmp_path / "password"), "TRAINMASTER_REDIS_URL": "redis://box:1/0"}
    settings = Settings.from_environment(given)
    assert settings.redis_url == "redis://:a%2Fb%20c@box:1/0"
    assert Settings.from_environment(given | settings.to_environment()) == settings
    (tmp_path / "password").unlink()
    with pytest.raises(BadSetting, match=r"TRAINMASTER_REDIS_PASSWORD_FILE .* cannot be read"):
        Settings.from_environment(given)


@pytest.mark.parametrize(("misspelt", "meant"), [("SLOT", "SLOTS"), ("REDIS_URI", "REDIS_URL"), ("APIKEY", "API_KEY")])
def test_a_misspelt_variable_is_named_with_the_one_that_was_meant(misspelt: str, meant: str) -> None:
    with pytest.raises(
        BadSetting, match=f"TRAINMASTER_{misspelt} is not read by anything; use TRAINMASTER_{meant}, or"
    ):
        Settings.from_environment({f"TRAINMASTER_{misspelt}": "x"})
    others = ("PORT", "JOB", "ATTEMPT", "CHAOS", "SERVICE_HOST")  # compose's, a trainer's, a test's, Kubernetes'
    assert Settings.from_environment({f"TRAINMASTER_{name}": "x" for name in others}).slots == ""


def test_two_that_share_a_runs_root_read_the_same_word_in_it(tmp_path: Path) -> None:
    one, other = replace(HOME, home=tmp_path / "one"), replace(HOME, home=tmp_path / "other")
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(runs_root_id, [one] * 16))) == 1
    assert runs_root_id(one) != runs_root_id(other)
    assert [path.name for path in one.runs.iterdir()] == [".root"]


def test_a_nodes_address_is_the_one_on_the_way_to_redis() -> None:
    assert node_address(replace(HOME, redis_url="redis://127.0.0.1:6379/0")) == "127.0.0.1"
    assert node_address(replace(HOME, redis_url="unix:///run/redis.sock")) == "127.0.0.1"
    assert node_address(replace(HOME, address="10.0.0.7")) == "10.0.0.7"
