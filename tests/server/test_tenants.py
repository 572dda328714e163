"""Whose key it is."""

from pathlib import Path

import pytest

from preble_sgl.errors import InputError
from preble_sgl.server.errors import ApiError
from preble_sgl.server.tenants import Tenant, Tenants, digest

SECRET = "sk-very-secret-1"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREBLE_API_KEYS", raising=False)
    monkeypatch.delenv("PREBLE_ADMIN_KEY", raising=False)


def load(directory: Path, text: str) -> Tenants:
    file = directory / "keys.toml"
    file.write_text(text)
    return Tenants.load(file)


def test_a_file_names_tenants_by_key_or_by_digest(tmp_path: Path) -> None:
    tenants = load(
        tmp_path,
        f"""
        [[key]]
        key = "{SECRET}"
        tenant = "search"
        max_running = 3
        [[key]]
        sha256 = "{digest("another-key")}"
        tenant = "mail"
        shares_cache = true
        admin = true
        """,
    )
    assert tenants.of(f"Bearer {SECRET}") == Tenant("search", 3, "search", False)
    assert tenants.of("bearer another-key") == Tenant("mail", None, "", True)
    assert tenants.admin("Bearer another-key").name == "mail"


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", SECRET, f"Basic {SECRET}"])
def test_no_key_or_a_wrong_one_is_refused(tmp_path: Path, given: str | None) -> None:
    tenants = load(tmp_path, f'[[key]]\nkey = "{SECRET}"\ntenant = "a"')
    with pytest.raises(ApiError) as refused:
        tenants.of(given)
    assert refused.value.status == 401
    assert SECRET not in str(refused.value)


def test_a_user_is_no_admin(tmp_path: Path) -> None:
    tenants = load(tmp_path, f'[[key]]\nkey = "{SECRET}"\ntenant = "a"')
    with pytest.raises(ApiError) as refused:
        tenants.admin(f"Bearer {SECRET}")
    assert refused.value.status == 403


def test_the_environment_names_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREBLE_API_KEYS", "a:key-of-a-1, b:key-of-b-1")
    monkeypatch.setenv("PREBLE_ADMIN_KEY", "key-of-admin")
    tenants = Tenants.load(None)
    assert tenants.of("Bearer key-of-a-1") == Tenant("a", None, "a")
    assert tenants.of("Bearer key-of-b-1").name == "b"
    assert tenants.admin("Bearer key-of-admin").is_admin


def test_without_keys_everybody_is_one_tenant() -> None:
    assert Tenants.load(None).of(None) == Tenant(is_admin=True)
    assert not Tenants({}).of(None).is_admin


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("key =", "is not TOML"),
        ("", "key: Field required"),
        ('[[key]]\ntenant = "a"', "give key or sha256"),
        (f'[[key]]\nkey = "{SECRET}"\ntenant = "a b"', "tenant: String should match"),
        (f'[[key]]\nkey = "{SECRET}"\ntenant = "a"\nmax_running = 0', "max_running"),
        (f'[[key]]\nkey = "{SECRET}"\ntenant = "a"\ncolour = 1', "colour: Extra inputs"),
        (f'[[key]]\nkey = "{SECRET}"\ntenant = "a"\n' * 2, "is there twice"),
    ],
)
def test_a_bad_file_is_told_in_one_line_without_the_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        load(tmp_path, text)
    assert told in str(error.value)
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Tenants.load(tmp_path / "none.toml")
