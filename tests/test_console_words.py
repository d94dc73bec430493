"""What pages call things, how their lists go on and back, and figures in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from api_kit import Api, add_prompt, make_gate, running, soft_prompt
from console_kit import Person, log_in, words

from app import job_queue, lifecycle
from app.console.pages import span
from app.console.playground import share

LIST = "/console/requests"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("words")
    with running(f"sqlite:///{folder}/letheon.db", folder) as api:
        yield api


@pytest.fixture(scope="module")
def admin(api: Api) -> Person:
    return log_in(api)


def pagers(page: Any) -> dict[str, dict[str, str]]:
    """By what they are of, the links of a page's pagers."""
    found = re.findall(r'<nav class="pager" aria-label="Pages of ([^"]+)">(.*?)</nav>', page.text, re.DOTALL)
    links = {of: re.findall(r'<a href="([^"]+)"[^>]*>(\w+)</a>', inner) for of, inner in found}
    return {
        of: {name: address.replace("&amp;", "&").partition("#")[0] for address, name in one}
        for of, one in links.items()
    }


def tables(page: Any) -> list[str]:
    return re.findall(r"<tbody>.*?</tbody>", page.text, re.DOTALL)


def test_both_lists_of_a_page_have_a_way_on_and_back(api: Api, admin: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and the active sets that they made, receipts and entries of the log: each pages by itself."""
    for name in ("prompts.PAGE", "prompts.VERSIONS", "evidence.PAGE", "evidence.ENTRIES"):
        monkeypatch.setattr(f"app.console.{name}", 2)
    for seed in range(5):
        add_prompt(api.service, soft_prompt(seed), make_gate(f"the plot {seed} is awful"), text=f"the plot {seed}")
    for path, lists in (
        ("/console/prompts", {"prompts", "active sets"}),
        ("/console/evidence", {"receipts", "the audit log"}),
    ):
        page = admin.get(path)
        assert set(pagers(page)) == lists, "two of them, told apart"
        assert [name for links in pagers(page).values() for name in links] == ["Older", "Older"]
        for of in lists:
            older = admin.get("/" + pagers(page)[of]["Older"])
            assert older.status_code == 200 and list(pagers(older)[of]) == ["Newest", "Older"]
            assert tables(older) != tables(page)
            back = admin.get("/" + pagers(older)[of]["Newest"])
            assert tables(back) == tables(page) and "Newest" not in pagers(back)[of]
    # A list of prompts stays where it is while one goes through the other, and so does what is shown.
    first = pagers(admin.get("/console/prompts?show=active"))["prompts"]["Older"]
    both = admin.get("/" + pagers(admin.get("/" + first))["active sets"]["Older"])
    assert [list(links) for links in pagers(both).values()] == [["Newest", "Older"]] * 2
    assert '?show=active" aria-current="true"' in both.text


def test_the_set_in_force_is_named_where_its_version_is(api: Api, admin: Person) -> None:
    add_prompt(api.service, soft_prompt(30), make_gate("the score is awful"), text="the score is awful")
    page = admin.get("/console/prompts")
    in_force, *others = re.findall(r"<tr>.*?</tr>", tables(page)[1], re.DOTALL)
    assert "In force" in in_force.partition("</td>")[0] and "Restore" not in in_force
    assert all("In force" not in row and "Restore" in row for row in others)
    assert '<th scope="col">Reason</th>' not in page.text, "no column without a word in it"
    earlier = re.findall(r"Restore version (\d+)", page.text)[0]
    assert admin.post(f"/console/active-sets/{earlier}/restore", {"reason": "hides too much"}).status_code == 303
    page = admin.get("/console/prompts")
    assert '<th scope="col">Reason</th>' in page.text and "hides too much" in words(page)


def test_a_worker_is_called_so_and_actions_are_in_words(api: Api, admin: Person) -> None:
    asked = api.submit(admin.headers)["id"]
    with api.service.sessions.begin() as session:
        claim = job_queue.claim(session, asked, owner="host-7:21872", lease_seconds=60, max_attempts=3)
    assert claim is not None
    page, evidence = admin.get(f"{LIST}/{asked}"), admin.get("/console/evidence")
    for shown in (page, evidence):
        assert f'<span class="mono" title="{claim.owner}">worker</span>' in shown.text
        assert "host-7" not in words(shown) and "Training began" in words(shown) and "Times are UTC." in words(shown)
    assert "request.training" not in words(evidence) and 'title="request.training"' in evidence.text


def test_remarks_have_a_place_of_their_own(api: Api, admin: Person) -> None:
    asked = api.submit(admin.headers)["id"]
    assert "Remarks of the checks They come with the checks." in words(admin.get(f"{LIST}/{asked}"))
    measured = {"retain_accuracy": 0.9, "retain_accuracy_before": 0.9, "forget_abstain": 1.0, "retain_rows": 9}
    measured["forget_abstain_before"] = 0.0
    for warnings, said in (([], "None."), (["few texts"], "Few texts.")):
        with api.service.sessions.begin() as session:
            lifecycle.get_request(session, asked).metrics = {**measured, "warnings": warnings}
        assert f"Remarks of the checks {said}" in words(admin.get(f"{LIST}/{asked}"))


def test_the_overview_says_what_is_in_force_and_where_it_is_listed(api: Api, admin: Person) -> None:
    page = admin.get("/")
    assert "suppressed now" not in words(page) and re.search(r"\d+ requests? in force: active set v\d+", words(page))
    assert '<a id="to-in-force" href="console/requests?show=active">In force</a>' in page.text
    assert "Still to do" in words(page) and "Owed" not in words(page)
    now = page.text[page.text.index('id="now"') :]
    for tag in re.findall(r"<(?:a|button|input)\b[^>]*>|<\w+[^>]* tabindex=[^>]*>", now.partition("</main>")[0]):
        assert ' id="' in tag, f"the focus would be lost: {tag}"


def test_lengths_of_time_are_in_the_nearer_unit() -> None:
    said = {47.99 * 3600: "2 days", 129_599: "36 h", 129_600: "2 days", 2.6e6: "30 days", 90: "2 min", 9.0: "9 s"}
    assert {seconds: span(seconds) for seconds in said} == said


def test_shares_have_one_digit_and_almost_none_is_not_none() -> None:
    said = {0.0: "0 %", 7e-8: "<0.1 %", 0.00099: "<0.1 %", 0.001: "0.1 %", 0.977: "97.7 %", 0.9996: ">99.9 %"}
    said[1.0] = "100 %"
    assert {probability: share(probability) for probability in said} == said
