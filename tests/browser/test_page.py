"""The page in a real browser, on runs that grow while it looks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect

from gptcore.events import Sampled
from gptcore.spec import parse_spec
from tests.api.server import FakeRun, Server, evaluated, step, train_spec
from tests.browser.conftest import Complaints
from tests.conftest import wait_until
from worker.job import BestCheckpoint, JobError
from worker.keyring import KeyRing
from worker.settings import Settings
from worker.store import Store

pytestmark = pytest.mark.slow

LOW_CONTRAST = Path(__file__).with_name("contrast.js").read_text()
# pixels of the train curve's colour
DRAWN = """() => {
    const canvas = document.querySelector("#loss-chart canvas");
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    let count = 0;
    for (let at = 0; at < pixels.length; at += 4)
        count += pixels[at + 3] > 200 && Math.abs(pixels[at] - 79) + Math.abs(pixels[at + 1] - 70) < 30;
    return count;
}"""
PICTURE = "document.querySelector('#loss-chart canvas').toDataURL()"


def feed(run: FakeRun, first: int, last: int) -> None:
    """Steps as a trainer and its launcher report them."""
    run.write(*(step(i, 5 / i**0.3) for i in range(first, last + 1)))
    run.report(step=last, total_steps=100, progress=last / 100, tokens_per_second=2560.0, eta_seconds=90.0)


def at_step(page: Page, number: int) -> None:
    expect(page.locator("#loss-chart")).to_have_attribute("aria-label", re.compile(f"At step {number}: "))


def give_key(page: Page, key: str) -> None:
    page.get_by_role("textbox", name="This server asks for").fill(key)
    page.keyboard.press("Enter")


def hide(page: Page, hidden: bool) -> None:
    """As if another tab lay over this one: without a window no tab ever does."""
    page.evaluate(
        """hidden => {
            Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )


def test_the_list_shows_every_run_with_its_numbers(page: Page, server: Server, new_run: Callable[..., FakeRun]) -> None:
    failed, running = new_run(name="broken"), new_run(name="good")
    feed(failed, 1, 3)
    failed.end("failed", error=JobError(reason="crash", message="boom"))
    feed(running, 1, 50)
    running.report(best_checkpoint=BestCheckpoint(step=50, val_loss=1.75), phase="training")
    server.http.post("/jobs", json=train_spec(name="waiting", resources={"pool": "other"}))
    page.goto(server.url)
    rows = page.locator("#runs tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.nth(0)).to_contain_text("waiting")
    expect(rows.nth(0)).to_contain_text("1. in queue")
    for text in ("good", "running · training", "50 / 100", "1.546", "val 1.750", "2.6K", "1 min 30 s"):
        expect(rows.nth(1)).to_contain_text(text)
    expect(rows.nth(1).locator("polyline")).to_have_count(1)
    expect(rows.nth(2)).to_contain_text("failed")
    feed(running, 51, 60)
    expect(rows.nth(1)).to_contain_text("60 / 100")


def test_a_curve_of_the_list_that_did_not_come_is_asked_for_again(
    page: Page, server: Server, run: FakeRun, complaints: Complaints
) -> None:
    complaints.expected = "Failed to load resource: net::"
    feed(run, 1, 5)
    page.route("**/sparklines?*", lambda route: route.abort(), times=1)
    page.goto(server.url)
    expect(page.locator("#connection")).to_contain_text("does not answer")
    expect(page.locator("#runs polyline")).to_have_count(1)
    expect(page.locator("#connection")).to_be_hidden()


def test_a_curve_is_drawn_and_grows_as_steps_come(page: Page, server: Server, run: FakeRun) -> None:
    feed(run, 1, 20)
    page.goto(server.url)
    page.get_by_role("link", name="tiny").click()
    at_step(page, 20)
    few = wait_until(lambda: page.evaluate(DRAWN))
    run.write(evaluated(20, 1.75))
    expect(page.locator("#loss-chart")).to_have_attribute("aria-label", re.compile("validation 1.750"))
    expect(page.locator("#news")).to_have_text("Step 20: validation loss 1.750")
    for last in range(21, 60):
        feed(run, last, last)
    at_step(page, 59)
    assert page.evaluate(DRAWN) != few
    run.begin_attempt()
    feed(run, 51, 70)  # steps that came before come again
    at_step(page, 70)
    linear = page.locator("#loss-chart canvas").screenshot()
    page.get_by_label("Log scale").check()
    logarithmic = page.locator("#loss-chart canvas").screenshot()
    page.get_by_label("Smoothing").fill("0.95")
    expect(page.locator("#smoothing-value")).to_have_text("0.95")
    assert linear != logarithmic
    run.end("succeeded", progress=1.0)
    expect(page.locator("#run-status")).to_have_text("succeeded")
    expect(page.get_by_role("button", name="Cancel run")).to_be_hidden()


def test_a_zoomed_curve_is_drawn_as_it_changes(page: Page, server: Server, run: FakeRun) -> None:
    feed(run, 1, 60)
    page.goto(f"{server.url}/#{run.id}")
    at_step(page, 60)
    whole = wait_until(lambda: page.evaluate(PICTURE))
    box = page.locator("#loss-chart .u-over").bounding_box()
    assert box
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 4, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, y, steps=5)
    page.mouse.up()
    zoomed = wait_until(lambda: page.evaluate(PICTURE) != whole and page.evaluate(PICTURE))
    run.begin_attempt()
    run.write(*(step(i, 1 + i % 2) for i in range(20, 61)))
    wait_until(lambda: page.evaluate(PICTURE) != zoomed)


def test_a_curve_of_one_point_is_seen(page: Page, server: Server, run: FakeRun) -> None:
    feed(run, 1, 1)
    page.goto(f"{server.url}/#{run.id}")
    at_step(page, 1)
    wait_until(lambda: page.evaluate(DRAWN) > 10)


def test_the_curve_of_a_run_that_ended_unseen_is_asked_for_until_it_comes(
    page: Page, server: Server, run: FakeRun, complaints: Complaints
) -> None:
    complaints.expected = "Failed to load resource: net::"
    feed(run, 1, 20)
    page.goto(f"{server.url}/#{run.id}")
    at_step(page, 20)
    hide(page, True)
    feed(run, 21, 30)
    run.end("succeeded")
    page.route("**/metrics?max_points=*", lambda route: route.abort(), times=1)
    hide(page, False)
    expect(page.locator("#run-status")).to_have_text("succeeded")
    at_step(page, 30)


def test_a_run_without_a_step_yet_is_shown_and_begins(page: Page, server: Server, run: FakeRun) -> None:
    page.goto(f"{server.url}/#{run.id}")
    at_step(page, 0)
    assert page.evaluate(DRAWN) == 0
    for last in range(1, 20):
        feed(run, last, last)
    at_step(page, 19)
    wait_until(lambda: page.evaluate(DRAWN) > 200)


def test_what_a_plan_warned_of_stands_with_a_run_until_it_ends(page: Page, server: Server) -> None:
    job_id = server.http.post("/jobs", json=train_spec()).json()["id"]
    page.goto(f"{server.url}/#{job_id}")
    expect(page.locator("#run-warnings")).to_contain_text("pool default has no live worker; the job waits")
    server.http.post(f"/jobs/{job_id}/cancel")
    expect(page.locator("#run-status")).to_have_text("cancelled")
    expect(page.locator("#run-warnings")).to_be_hidden()


def test_a_run_is_cancelled_by_keyboard_after_a_question(
    page: Page, server: Server, run: FakeRun, store: Store
) -> None:
    feed(run, 1, 5)
    page.goto(server.url)
    expect(page.get_by_role("link", name="tiny")).to_be_visible()
    page.get_by_role("link", name="tiny").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#run-title")).to_be_focused()
    page.get_by_role("button", name="Cancel run").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("Cancel tiny?")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert store.get_job(run.id).status == "running"
    page.keyboard.press("Enter")
    page.get_by_role("dialog").get_by_role("button", name="Cancel run").press("Enter")
    expect(page.locator("#run-status")).to_have_text("cancelling")
    assert store.get_job(run.id).status == "cancelling"
    run.end("cancelled")
    expect(page.locator("#run-status")).to_have_text("cancelled")
    expect(page.locator("#news")).to_have_text("tiny is cancelled")


def test_a_run_is_paused_and_resumed(page: Page, server: Server, run: FakeRun) -> None:
    feed(run, 1, 5)
    page.goto(f"{server.url}/#{run.id}")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#run-status")).to_have_text("pausing")
    expect(page.get_by_role("button", name="Pause")).to_be_disabled()
    run.end("queued")  # as a launcher says that its trainer has left
    expect(page.locator("#run-status")).to_have_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#run-status")).to_have_text("queued")


def test_a_refusal_stands_until_the_next_action(
    page: Page, server: Server, run: FakeRun, complaints: Complaints, settings: Settings
) -> None:
    complaints.expected = ".* status of 40[13]"
    run.log_file.write_text("loss 2.5")
    key = KeyRing(settings.redis_url, settings.home).create("me", "read")[1]
    page.goto(f"{server.url}/#{run.id}")
    give_key(page, key)
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#connection")).to_contain_text("this needs a key of scope submit")
    feed(run, 1, 5)
    expect(page.locator("#run-steps")).to_have_text("step 5 of 100")  # by a poll, which went well
    expect(page.locator("#connection")).to_be_visible()
    page.get_by_role("link", name="Log").click()
    expect(page.locator("#connection")).to_be_hidden()


def test_a_proxys_error_ends_no_curve(page: Page, server: Server, run: FakeRun, complaints: Complaints) -> None:
    complaints.expected = ".* status of 502"
    feed(run, 1, 5)
    answers = iter([502])

    def answer(route: Route) -> None:
        status = next(answers, None)
        route.fulfill(status=status, body="<html>bad gateway</html>") if status else route.continue_()

    page.route("**/metrics?after=*", answer)
    page.goto(f"{server.url}/#{run.id}")
    at_step(page, 5)
    run.write(step(6))
    at_step(page, 6)
    assert next(answers, None) is None


def test_a_run_that_failed_goes_on_as_a_new_job(page: Page, server: Server, run: FakeRun, store: Store) -> None:
    feed(run, 1, 5)
    checkpoint = run.directory.checkpoints / "step-00000005-a0001"
    checkpoint.mkdir(parents=True)
    spec = store.get_job(run.id).spec
    of_it = spec | {"model": spec["model"] | {"vocab_size": 256}}
    (checkpoint / "state.json").write_text(json.dumps({"sizes": {}, "spec": of_it}))
    page.goto(f"{server.url}/#{run.id}")
    run.end("failed")
    page.get_by_role("button", name="Go on").dblclick()
    expect(page.locator("#run-status")).to_have_text("queued")
    newest, *others = store.list_jobs().data
    assert [job.id for job in others] == [run.id]
    assert page.url.endswith(f"#{newest.id}") and newest.id != run.id
    assert newest.spec["init_from"] == {"source": run.id, "optimizer": True}


def test_what_evaluations_found_and_the_model_wrote_stands_with_its_run(
    page: Page, server: Server, new_run: Callable[..., FakeRun], settings: Settings, store: Store
) -> None:
    run = new_run(sample={"every_steps": 10, "prompt": "def "})
    spec = parse_spec({"kind": "eval", "name": "scores", "source": run.id, "tasks": ["hellaswag"]})
    evaluation = FakeRun(settings, store, store.create_job(spec, None, parent_job_id=run.id)[0])
    page.goto(f"{server.url}/#{run.id}")
    expect(page.locator("#results")).to_have_text("scores queued")
    feed(run, 1, 12)
    run.write(Sampled(step=10, prompt="def ", text="<b>run():"))
    expect(page.locator("#samples")).to_have_text("step 10def <b>run():")
    run.end("succeeded")
    evaluation.begin_attempt()
    evaluation.report(results={"hellaswag_acc_norm": 0.29514})
    evaluation.end("succeeded")
    expect(page.locator("#results")).to_have_text("scores succeeded hellaswag_acc_norm 0.2951")
    page.get_by_role("link", name="scores").click()
    expect(page.locator("#results")).to_have_text("hellaswag_acc_norm 0.2951")
    expect(page.locator("#figures dt")).to_have_text(["Took", "Attempt"])
    expect(page.locator("#samples-card")).to_be_hidden()
    page.get_by_role("link", name=f"about {run.id}").click()
    expect(page.locator("#run-title")).to_have_text("tiny")


def test_what_is_no_finite_number_is_shown_so(page: Page, server: Server, run: FakeRun) -> None:
    feed(run, 1, 5)
    run.report(results={"score": math.nan})
    page.goto(f"{server.url}/#{run.id}")
    at_step(page, 5)
    expect(page.locator("#results")).to_have_text("score NaN")
    run.write(step(6, math.nan), evaluated(6, math.inf))
    expect(page.locator("#news")).to_have_text("Step 6: validation loss Infinity")
    at_step(page, 6)


def test_what_a_reader_selected_and_focused_stays(page: Page, server: Server, run: FakeRun, store: Store) -> None:
    spec = parse_spec({"kind": "eval", "name": "scores", "source": run.id, "tasks": ["hellaswag"]})
    store.create_job(spec, None, parent_job_id=run.id)
    page.goto(f"{server.url}/#{run.id}")
    expect(page.get_by_role("link", name="scores")).to_be_visible()  # it moves what stands below
    page.get_by_text("Spec", exact=True).click()
    page.locator("#spec").select_text()
    page.get_by_role("link", name="scores").focus()
    feed(run, 1, 5)
    expect(page.locator("#run-steps")).to_have_text("step 5 of 100")
    expect(page.get_by_role("link", name="scores")).to_be_focused()
    assert page.evaluate("getSelection().toString()") == page.locator("#spec").inner_text()


def test_what_a_user_wrote_is_shown_and_never_run(page: Page, server: Server, new_run: Callable[..., FakeRun]) -> None:
    hostile = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    run = new_run(labels={"note": hostile})
    feed(run, 1, 2)
    run.end("failed", error=JobError(reason="crash", message=hostile, log=[hostile]))
    page.goto(f"{server.url}/#{run.id}")
    for place in ("#run-labels", "#error-message", "#error-log", "#spec"):
        expect(page.locator(place)).to_contain_text("<img src=x")
    assert page.locator("main img, main script").count() == 0
    expect(page).to_have_title(re.compile("tiny · failed"))


def test_the_curve_goes_on_after_the_server_was_away(
    page: Page, server: Server, run: FakeRun, complaints: Complaints
) -> None:
    complaints.expected = "Failed to load resource: net::"
    feed(run, 1, 10)
    page.goto(f"{server.url}/#{run.id}")
    at_step(page, 10)
    server.stop()
    expect(page.locator("#connection")).to_contain_text("does not answer")
    feed(run, 11, 20)
    server.start()
    at_step(page, 20)
    expect(page.locator("#connection")).to_be_hidden()
    feed(run, 21, 30)
    at_step(page, 30)


def test_a_run_is_open_in_more_tabs_than_a_browser_has_connections(page: Page, server: Server, run: FakeRun) -> None:
    streams: set[Request] = set()
    page.on("request", lambda request: streams.add(request) if "after=" in request.url else None)
    page.on("requestfailed", lambda request: streams.discard(request))
    feed(run, 1, 5)
    tabs = [page, *(page.context.new_page() for _ in range(6))]
    for tab in tabs:
        tab.goto(f"{server.url}/#{run.id}")
        at_step(tab, 5)
        hide(tab, True)
    feed(run, 6, 10)
    for hidden in (False, True):
        hide(page, hidden)
    at_step(page, 10)
    assert not streams
    for hidden in (False, True, False):
        hide(page, hidden)
    for last in (11, 12):
        feed(run, last, last)
        at_step(page, last)
    expect(page.locator("#run-steps")).to_have_text("step 12 of 100")  # by a poll, which would open what is missing
    assert len(streams) == 1


def test_the_page_asks_for_a_key_and_keeps_it_in_its_tab(
    page: Page, server: Server, run: FakeRun, complaints: Complaints, settings: Settings
) -> None:
    complaints.expected = ".* status of 401"
    feed(run, 1, 10)
    run.log_file.write_text("loss 2.5")
    text = KeyRing(settings.redis_url, settings.home).create("me", "submit")[1]
    page.goto(f"{server.url}/#{run.id}")
    for key in ("tm_no_key", "ключ", text):
        give_key(page, key)
    at_step(page, 10)
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator("#connection")).to_be_hidden()
    feed(run, 11, 20)  # the stream has it too
    at_step(page, 20)
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Log").click()
    expect(opened.value.locator("body")).to_have_text("loss 2.5")
    page.context.route(re.compile(r"^https://"), lambda route: route.abort())
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="API").click()
    opened.value.wait_for_url("**/docs")
    assert opened.value.evaluate("sessionStorage.length") == 0
    page.reload()
    at_step(page, 20)
    assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []


def test_a_run_that_is_not_there_is_said_so(page: Page, server: Server, run: FakeRun, complaints: Complaints) -> None:
    complaints.expected = ".* status of 404"
    for missing in ("job-0", "%"):
        page.goto(f"{server.url}/#{run.id}")
        expect(page.get_by_role("button", name="Cancel run")).to_be_visible()
        page.goto(f"{server.url}/#{missing}")
        expect(page.locator("#connection")).to_contain_text(f"there is no job '{missing}'")
        expect(page).to_have_title("Trainmaster")
        assert page.locator("#run-view").inner_text().strip() == "← All runs"
    page.get_by_role("link", name="All runs").click()
    expect(page.get_by_role("link", name="tiny")).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_its_width_in_both_themes(
    browser: Browser, server: Server, new_run: Callable[..., FakeRun], theme: str, width: int
) -> None:
    name = "a-name-without-any-place-to-break-it-in-two-or-three-lines-of-text"
    run = new_run(name=name, labels={"k": "v" * 150}, sample={"every_steps": 30})
    feed(run, 1, 30)
    run.write(Sampled(step=30, prompt="p", text="t" * 300))
    run.report(results={f"lm_eval:{'a' * 60}/acc": 0.5})
    run.end("failed", error=JobError(reason="crash", message="m" * 200, log=["l" * 300]))
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)  # type: ignore[arg-type]
    page.goto(server.url)
    page.locator("#runs polyline").wait_for()
    for _ in ("list", "run"):
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(LOW_CONTRAST) == []
        page.get_by_role("link", name="a-name").click() if page.locator("#list-view").is_visible() else None
        page.locator("#loss-chart canvas").wait_for(state="attached")
    page.close()
