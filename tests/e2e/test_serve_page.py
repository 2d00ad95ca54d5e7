"""The web page in a real browser, before a real server: what a person does, and what must not happen."""

import contextlib
import os
import re
import shutil
import urllib.request
from urllib.parse import urlsplit

import pytest
from bundle_cases import save_untrained_bundle
from playwright.sync_api import expect, sync_playwright
from service_cases import serving, settings

from raydistill.service.keys import ApiKeys
from raydistill.service.tables import JOBS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
PROMPT = "a red circle moves slowly left over a plain background"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system; without it nothing here can be known, which CI does not take for an answer."""
    program = shutil.which("chromium")
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("there is no chromium on PATH")
    expect.set_options(timeout=20000)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield running
        running.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundle, browser):
    with serving(settings(tmp_path_factory.mktemp("server"), bundle)) as running:
        yield running


@pytest.fixture
def served(tmp_path, bundle):
    """Starts servers of other settings: served(workers=0, **changes) -> Server."""
    with contextlib.ExitStack() as running:

        def start(workers=1, **changes):
            return running.enter_context(serving(settings(tmp_path, bundle, **changes), workers=workers))

        yield start


class Visit:
    """A page of a browser profile of its own, and what it did that a page should not."""

    def __init__(self, context, server):
        self.server, self.urls, self.errors = server, [], []
        self.expected = set()
        self.page = context.new_page()
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.on("console", lambda told: self.errors.append(told.text) if told.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def go(self):
        self.page.goto(self.server.url)
        return self.page

    def require_clean(self):
        """Refusals that a test expects are in the browser's console too, by their status."""
        refused = re.compile(r"Failed to load resource: .* status of (\d+)")
        told = [(refused.match(error), error) for error in self.errors]
        assert not [error for match, error in told if not match or int(match[1]) not in self.expected]
        hosts = {urlsplit(url).netloc for url in self.urls if not url.startswith(("data:", "blob:"))}
        assert hosts == {urlsplit(self.server.url).netloc}


@pytest.fixture
def visit(browser, served):
    """Opens pages, visit(server) -> Visit; closes them before the servers, which wait for open streams."""
    opened = []

    def open_one(server):
        context = browser.new_context(viewport=DESKTOP)
        context.set_default_timeout(20000)
        opened.append((context, Visit(context, server)))
        return opened[-1][1]

    yield open_one
    for context, one in opened:
        context.close()
        one.require_clean()


def ask(page, prompt=PROMPT, **fields):
    """Fill the form and send it, once the server's models are there."""
    expect(page.locator("#model option")).not_to_have_count(0)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)
    page.get_by_role("button", name="Generate").click()


def videos(server):
    return server.store.page(None, 100, "desc", None)[0]


def playing(page, where, count=1):
    """Wait until so many videos there have pictures and have moved on."""
    page.wait_for_function(
        """([where, count]) => {
            const players = [...document.querySelectorAll(`${where} video`)];
            const plays = (one) => one.readyState >= 2 && one.currentTime > 0.2;
            return players.length === count && players.every(plays);
        }""",
        arg=[where, count],
    )


def test_a_prompt_gives_previews_and_then_a_playing_video(server, visit, tmp_path):
    page = visit(server).go()
    expect(page.locator("#load-text")).to_contain_text("1 replica")
    assert page.locator("#key-form").is_hidden()
    page.evaluate(
        """() => {
            window.seen = [];
            const count = (what) => document.querySelectorAll(`#result ${what}`).length;
            const look = () => window.seen.push([count(".preview"), count("video")]);
            const all = {childList: true, subtree: true};
            new MutationObserver(look).observe(document.querySelector("#result"), all);
        }"""
    )
    ask(page, seed="7", steps="2")
    playing(page, "#result")
    assert [3, 0] in page.evaluate("() => window.seen")
    labels = [" ".join(text.split()) for text in page.locator("#result .preview").all_inner_texts()]
    assert labels == ["step 1 semantic", "step 2 semantic", "step 3 detail"]
    look = "(one) => [one.loop, one.clientWidth >= 256, getComputedStyle(one).imageRendering]"
    assert page.locator("#result video").evaluate(look) == [True, True, "pixelated"]
    job, record = videos(server)[0], page.locator("#result .record").inner_text()
    assert re.search(rf"seed\s+7\n.*{job.bundle}", record, re.DOTALL)
    assert page.locator("#result .legend li").count() == 5
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes() == server.ingress.files.read(job.result["video"])
    page.reload()
    playing(page, "#result")
    for name, size in (("desktop", DESKTOP), ("phone", PHONE)):
        page.set_viewport_size(size)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= size["width"]
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)


def test_side_by_side_shows_every_number_of_steps_of_one_seed_in_step(server, visit, tmp_path):
    page = visit(server).go()
    before = len(videos(server))
    page.get_by_role("button", name="blue square").click()
    page.get_by_role("button", name="Side by side").click()
    playing(page, "#comparison", 4)
    names = page.locator("#comparison .run-name").all_inner_texts()
    assert names == ["1 step", "2 steps", "4 steps", "8 steps"]
    passes = [text.partition(",")[0] for text in page.locator("#comparison .run-facts").all_inner_texts()]
    assert passes == ["1 pass", "2 passes", "4 passes", "8 passes"]
    made = videos(server)[: len(videos(server)) - before]
    assert [job.request["plan"] for job in reversed(made)] == ["1", "2", "4", "8"]
    assert len({job.request["seed"] for job in made}) == 1
    expect(page.locator("#comparison-about")).to_contain_text(f"(seed {made[0].request['seed']})")
    at = "[...document.querySelectorAll('#comparison video')].map((one) => one.currentTime)"
    page.evaluate("() => { document.querySelector('#comparison video').currentTime += 0.9 }")
    page.wait_for_function(f"() => Math.max(...{at}) - Math.min(...{at}) < 0.2")  # from the next round on
    page.get_by_role("button", name="Pause all").click()
    paused = page.evaluate(at)
    page.wait_for_timeout(300)
    assert page.evaluate(at) == paused
    page.screenshot(path=tmp_path / "side-by-side.png", full_page=True)


def test_settings_of_a_video_can_be_used_again(server, visit):
    page = visit(server).go()
    page.locator("#plan").select_option("2+tail")
    assert page.locator("#steps").is_disabled()
    ask(page, seed="5")
    playing(page, "#result")
    assert videos(server)[0].request["plan"] == "2+tail"
    page.reload()
    page.get_by_role("button", name="Use these settings").click()
    fields = [page.locator(f"#{name}").input_value() for name in ("prompt", "seed", "plan")]
    assert fields == [PROMPT, "5", "2+tail"]


def test_a_prompt_with_markup_is_text_wherever_it_is_shown(server, visit):
    seen = visit(server)
    page = seen.go()
    prompt = '<img src=x onerror="window.ran = 1"><b id="bold">bold</b>'
    ask(page, prompt, steps="0")
    playing(page, "#result")
    assert page.locator("#result .run-prompt").inner_text() == prompt
    assert page.locator("#gallery .card-prompt").first.inner_text() == prompt
    with page.expect_response(re.compile(r"/remix$")):
        page.get_by_role("button", name="Remix").click()
    expect(page.locator("#result .record")).to_contain_text("remix of")
    page.locator("#result .record a").click()
    expect(page.locator("#result .record")).not_to_contain_text("remix of")
    page.locator("#gallery .thumb").nth(1).click()
    playing(page, "#result")
    assert page.evaluate("() => window.ran") is None
    assert page.locator("img[src='x'], #bold").count() == 0
    assert not [url for url in seen.urls if url.endswith("/x")]


def test_a_refused_field_says_so_itself(server, visit):
    seen = visit(server)
    seen.expected = {400}
    page = seen.go()
    before = len(videos(server))
    ask(page, seed="seven")
    error = page.locator("#seed-error")
    expect(error).to_contain_text("invalid_value")
    expect(error).to_contain_text("integer")
    expect(page.locator("#seed")).to_be_focused()
    assert page.locator("#seed").get_attribute("aria-invalid") == "true"
    assert page.locator("#ask-problem").is_hidden()
    page.locator("#seed").fill("")
    expect(error).to_be_hidden()
    ask(page, "x" * 2001)
    expect(page.locator("#prompt-error")).to_contain_text("prompt_too_long")
    assert len(videos(server)) == before


def test_a_full_queue_says_when_to_try_again_and_a_waiting_video_can_be_cancelled(served, visit):
    full = served(workers=0, limits={"queued_jobs": 1})
    seen = visit(full)
    seen.expected = {429, 503}
    page = seen.go()
    expect(page.locator("#load-text")).to_contain_text("no replica")
    ask(page, seed=str(2**63 - 1))
    status = page.locator("#result .run-status")
    expect(status).to_have_text("Queued: next")
    expect(page.locator("#result .record")).to_contain_text(str(2**63 - 1))
    ask(page)
    expect(page.locator("#ask-problem")).to_contain_text("queue_full")
    expect(page.locator("#ask-problem")).to_contain_text(re.compile(r"Try again in \d+ s, at "))
    expect(page.locator("#load-text")).to_contain_text("queue full")
    cancel = page.get_by_role("button", name="Cancel", exact=True)
    cancel.click()
    expect(status).to_have_text("Cancelled")
    expect(cancel).to_be_hidden()
    assert [job.state for job in videos(full)] == ["cancelled"]
    expect(page.locator("#gallery .thumb-note")).to_have_text("Cancelled")


def test_the_gallery_pages_deletes_and_explains(served, visit):
    idle = served(workers=0)
    seen = visit(idle)
    for seed in range(13):
        body = f'{{"prompt": "number {seed}", "seed": {seed}}}'.encode()
        headers = {"content-type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{idle.url}/v1/videos", body, headers)).close()
    broken = videos(idle)[0].id
    error = ("generation_failed", "<b>it did not work</b>")
    with idle.store.database.write() as connection:
        idle.store.journal.end(connection, JOBS.c.id == broken, "failed", error)
    page = seen.go()
    cards = page.locator("#gallery .card")
    expect(cards).to_have_count(12)
    expect(cards.first).to_contain_text("generation_failed <b>it did not work</b>")
    page.get_by_role("button", name="More").click()
    expect(cards).to_have_count(13)
    expect(page.get_by_role("button", name="More")).to_be_hidden()
    prompts = page.locator(".card-prompt").all_inner_texts()
    assert prompts == [f"number {seed}" for seed in range(12, -1, -1)]
    cards.nth(0).get_by_role("button", name="Delete").click()
    assert len(videos(idle)) == 13
    cards.nth(0).get_by_role("button", name="Delete for good?").click()
    expect(cards).to_have_count(12)
    assert broken not in {job.id for job in videos(idle)}


def test_a_server_with_keys_is_asked_with_one(served, visit):
    closed = served(auth={"required": True})
    key = ApiKeys(closed.store.database).create("me", ["generate"])
    seen = visit(closed)
    seen.expected = {401}
    page = seen.go()
    field = page.get_by_label("API key", exact=True)
    expect(field).to_be_focused()
    field.fill("rd-wrong")
    field.press("Enter")
    expect(page.locator("#key-error")).to_contain_text("invalid_api_key")
    field.fill(key)
    field.press("Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    ask(page)
    playing(page, "#result")
    expect(page.locator("#gallery .thumb img")).to_have_count(1)
    assert [job.tenant for job in videos(closed)] == ["me"]
    assert not [url for url in seen.urls if key in url]
    page.get_by_role("button", name="Forget the API key").click()
    expect(field).to_be_visible()


def test_a_broken_stream_goes_on_after_the_last_event(server, visit):
    page = visit(server).go()
    asked, cut = [], []

    def break_off(route):
        asked.append(route.request.headers.get("last-event-id"))
        if len(asked) > 1:
            return route.continue_()
        answer = route.fetch()
        body = answer.body().decode()
        cut.append(body[: body.index("event: video.partial_frame") + 200])
        return route.fulfill(status=200, headers={"content-type": "text/event-stream"}, body=cut[0])

    page.route("**/events", break_off)
    ask(page, steps="2")
    playing(page, "#result")
    heard = cut[0].replace("\r", "").rpartition("\n\n")[0]
    assert asked == [None, re.findall(r"^id: (\d+)$", heard, re.MULTILINE)[-1]]
    assert page.locator("#result .preview").count() == 3


def test_a_stream_that_stays_away_is_given_up_and_taken_up_again(server, visit):
    seen = visit(server)
    page = seen.page
    page.clock.install()
    seen.go()
    tries = []

    def refuse(route):
        tries.append(route.request.url)
        route.fulfill(status=502, body="a proxy")

    page.route("**/events", refuse)
    seen.expected = {502}
    ask(page, steps="0")
    again = page.get_by_role("button", name="Try again")
    while not again.is_visible():
        page.clock.run_for(2000)
    assert len(tries) == 7
    expect(page.locator("#result .problem")).to_contain_text("http_502")
    page.unroute("**/events")
    again.click()
    expect(page.locator("#result video")).to_have_count(1)
