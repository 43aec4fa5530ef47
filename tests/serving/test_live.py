"""The live page: a stranger sees nothing on it, the admin who is where; and it works in a real browser."""

import re
import shutil
import subprocess

import pytest

from labs_lib.serving import live

from .house import ADMIN, PROMPT, eventually, open_house

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with open_house(tmp_path_factory.mktemp("house"), engine={"slots": 1}) as house:
        for tenant in ("acme", "bolt", "acme"):  # one slot: each takes it from the other
            house.openai(tenant).completions.create(model=tenant, prompt=PROMPT, max_tokens=4, temperature=0)
        house.registry.add_tenant("cove")  # who has published nothing
        yield house


def test_the_page_is_public_and_knows_nobody(house):
    answer = house.http(None).get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert not re.search("acme|bolt|cove", answer.text)
    assert "http://" not in answer.text and "https://" not in answer.text  # no outside asset
    assert "innerHTML" not in answer.text


def test_the_page_may_run_its_own_script_only(house):
    policy = dict(
        part.split(" ", 1)
        for part in house.http(None).get("/").headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-") and "unsafe" not in " ".join(policy.values())


def test_who_is_where_is_for_the_admin(house):
    assert house.http(None).get("/admin/live").status_code == 401
    assert house.http("acme").get("/admin/live").status_code == 403
    assert house.http(ADMIN).get("/admin/live", params={"since": -1}).status_code == 400


def test_the_picture_says_who_is_where(house):
    now = house.http(ADMIN).get("/admin/live").json()
    rows = {row["name"]: row for row in now["tenants"]}
    assert (rows["acme"]["tier"], rows["bolt"]["tier"], rows["cove"]["tier"]) == ("device", "host", "none")
    assert rows["acme"]["slot"] == 1 and now["slots"][0]["adapter"] == house.sha("acme")
    assert rows["acme"]["requests"] == 2 and rows["bolt"]["requests"] == 1
    assert 0 < rows["acme"]["ttft_ms"] <= rows["acme"]["total_ms"] and rows["cove"]["ttft_ms"] is None
    moves = [move["what"] for move in now["moves"]]
    assert moves == ["load", "host", "device", "load", "host", "evict", "device", "evict", "device"]
    gone = next(move for move in now["moves"] if move["what"] == "evict")
    assert (gone["of"], gone["tenant"], gone["slot"]) == ("acme", "bolt", 1)
    assert house.http(ADMIN).get("/admin/live", params={"since": now["seen"]}).json()["moves"] == []


def test_what_waits_and_what_is_on_disk_is_seen(tmp_path):
    with open_house(tmp_path, started=False) as house:
        assert {row["tier"] for row in live.picture(house.engine, house.registry)["tenants"]} == {"disk"}
        from labs_lib.serving.types import Request

        ended = []
        house.engine.submit(Request([5, 6, 7], "acme", house.sha("acme"), max_tokens=2), on_end=ended.append)
        now = live.picture(house.engine, house.registry)
        acme = next(row for row in now["tenants"] if row["name"] == "acme")
        assert (acme["waiting"], acme["running"], now["waiting"]) == (1, 0, 1)
        assert acme["tier"] in ("loading", "host")
        house.engine.start()
        eventually(lambda: ended)


def browse(url: str, milliseconds: int = 4000) -> str:
    """What a browser makes of an address after so much of its time, as HTML."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--no-first-run"]
    command += ["--disable-background-networking", f"--virtual-time-budget={milliseconds}", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(house):
    html = browse(f"{house.url}/#key={ADMIN}")
    text = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", html, flags=re.S)
    assert re.search(r'id="state"[^>]*>live<', text)
    assert re.search(r"<td>acme</td><td>1</td><td><span class=\"tier device\">slot 1</span>", text)
    assert "bolt v1 leaves slot 1 for acme" in text
    assert ADMIN not in text
    refused = browse(f"{house.url}/#key=wrong", 1500)
    assert "this is not the admin key" in refused and "<td>acme" not in refused
